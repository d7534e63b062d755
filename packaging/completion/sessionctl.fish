# Completion of sessionctl for fish: as sessionctl.fish in a directory of $fish_complete_path.

# The first column of a table. Nobody is asked for a password by these.
function __sessionctl_names
    LC_ALL=C sessionctl $argv 2>/dev/null | sed '1d; s/ .*//'
end

# What is given beside options and their values: the command, the session, ... An option may still lack its
# value.
function __sessionctl_words
    argparse --ignore-unknown 'id=' 'grace=' 'snapshot-as=' 'keep=+' 'at=' 'in=' 'idle=' 'warning=' \
        'why=' 'description=' 'name=' 'format=' 'conflicts=' 'from=' 'to=' 'directories=' 'depth=' \
        'message=' 'config=' 'state-directory=' 'upper=' 'work=' 'lower=' -- (commandline -opc)[2..] ''
    string match --invert --regex -- '^(-.*)?$' $argv
end

# Whether so many words are there, and the first is one of the rest.
function __sessionctl_at
    set -l words (__sessionctl_words)
    test (count $words) -eq $argv[1]; and contains -- $words[1] $argv[2..]
end

function __sessionctl_snapshots
    set -l words (__sessionctl_words)
    test (count $words) -ge 2; and __sessionctl_names snapshots $words[2]
end

set -l on_session status reset schedule-reset cancel-reset inhibit conflicts snapshot snapshots restore \
    edit-snapshot delete-snapshot export import persist rebase shadowed commit uncommit committed keep \
    diff wait cancel close run shell check

complete -c sessionctl -f
complete -c sessionctl -s h -l help -d 'show help'
complete -c sessionctl -n 'test (count (__sessionctl_words)) -eq 0' -l version -d 'show the version'

set -l first 'test (count (__sessionctl_words)) -eq 0'
complete -c sessionctl -n $first -a list -d 'list all sessions'
complete -c sessionctl -n $first -a status -d 'show all about one session'
complete -c sessionctl -n $first -a create -d 'make a session and mount it'
complete -c sessionctl -n $first -a reset -d 'drop all changes'
complete -c sessionctl -n $first -a schedule-reset -d 'have a session reset at another time'
complete -c sessionctl -n $first -a cancel-reset -d 'cancel a reset that was scheduled'
complete -c sessionctl -n $first -a inhibit -d 'hold back scheduled resets while a command runs'
complete -c sessionctl -n $first -a conflicts -d 'list the programs that use a session'
complete -c sessionctl -n $first -a snapshot -d 'keep the present state of a session'
complete -c sessionctl -n $first -a snapshots -d 'list the snapshots of a session'
complete -c sessionctl -n $first -a restore -d 'go back to a snapshot'
complete -c sessionctl -n $first -a edit-snapshot -d 'rename, describe, pin or release a snapshot'
complete -c sessionctl -n $first -a delete-snapshot -d 'delete a snapshot'
complete -c sessionctl -n $first -a export -d 'write a snapshot to a file'
complete -c sessionctl -n $first -a import -d 'make a snapshot of such a file'
complete -c sessionctl -n $first -a persist -d 'move a session to disk'
complete -c sessionctl -n $first -a rebase -d 'put a session over the image that there is now'
complete -c sessionctl -n $first -a shadowed -d 'list what both a session and its image have changed'
complete -c sessionctl -n $first -a commit -d 'save files and directories for later sessions'
complete -c sessionctl -n $first -a uncommit -d 'have committed files be the image\'s after the next reset'
complete -c sessionctl -n $first -a committed -d 'list what was committed'
complete -c sessionctl -n $first -a keep -d 'set the rules for what outlives resets'
complete -c sessionctl -n $first -a diff -d 'list what differs from the image, or from a snapshot'
complete -c sessionctl -n $first -a wait -d 'wait until a session is mounted'
complete -c sessionctl -n $first -a cancel -d 'cancel the job that runs on a session'
complete -c sessionctl -n $first -a close -d 'unmount a session and drop its changes'
complete -c sessionctl -n $first -a maintenance -d 'make a new image in a session of root\'s'
complete -c sessionctl -n $first -a guest -d 'make or remove a user without a password'
complete -c sessionctl -n $first -a run -d 'run a command in a session\'s root'
complete -c sessionctl -n $first -a shell -d 'start the user\'s shell in a session\'s root'
complete -c sessionctl -n $first -a check -d 'look for damage'
complete -c sessionctl -n $first -a monitor -d 'print what happens to sessions'
complete -c sessionctl -n $first -a top -d 'show the sessions and how full they are, live'

complete -c sessionctl -n "__sessionctl_at 1 $on_session" -a '(__sessionctl_names list)'
complete -c sessionctl -n '__sessionctl_at 2 restore edit-snapshot delete-snapshot export' -a '(__sessionctl_snapshots)'
complete -c sessionctl -n '__sessionctl_at 3 export import' -F
complete -c sessionctl -n '__sessionctl_at 1 create' -a '(__fish_complete_users)'
complete -c sessionctl -n '__sessionctl_at 1 maintenance' -a 'begin finish cancel status'
complete -c sessionctl -n '__sessionctl_at 1 guest' -a 'add remove list'
complete -c sessionctl -n '__sessionctl_at 2 guest' -a '(sessionctl guest list 2>/dev/null)'
complete -c sessionctl -n '__fish_seen_subcommand_from run inhibit; and contains -- -- (commandline -opc)' \
    -a '(__fish_complete_subcommand --commandline (string match --regex -- "(?<= -- ).*" (commandline -cp)))'

set -l of __fish_seen_subcommand_from
set -l telling list status create conflicts snapshot snapshots shadowed committed diff maintenance guest check monitor
complete -c sessionctl -n "$of $telling" -l json -d 'print JSON, for programs'
complete -c sessionctl -n "$of create maintenance" -x -l id -d 'id of the session'
complete -c sessionctl -n "$of reset schedule-reset restore" -l terminate -d 'end the programs that use the session first'
complete -c sessionctl -n "$of reset schedule-reset restore" -x -l grace -d 'seconds that they have for that'
complete -c sessionctl -n "$of reset schedule-reset restore" -l snapshot-first -d 'keep what there is'
complete -c sessionctl -n "$of reset schedule-reset restore" -x -l snapshot-as -d 'the same, under this name'
complete -c sessionctl -n "$of reset schedule-reset" -x -l keep -d 'leave what is at this path as it is'
complete -c sessionctl -n "$of schedule-reset" -x -l at -d 'at that time, like 18:30'
complete -c sessionctl -n "$of schedule-reset" -x -l in -d 'after a while, like 2h'
complete -c sessionctl -n "$of schedule-reset" -x -l idle -d 'once its user has not been there so long'
complete -c sessionctl -n "$of schedule-reset" -x -l warning -d 'announce it so long before'
complete -c sessionctl -n "$of inhibit" -x -l why -d 'shown to others'
complete -c sessionctl -n "$of snapshot edit-snapshot import" -x -l description -d 'what it is good for'
complete -c sessionctl -n "$of snapshot edit-snapshot" -l pin -d 'keep it, whatever the rules say'
complete -c sessionctl -n "$of edit-snapshot" -l no-pin -d 'leave it to the rules'
complete -c sessionctl -n "$of edit-snapshot" -x -l name -d 'a new name'
complete -c sessionctl -n "$of restore" -l no-undo -d 'give up what is replaced'
complete -c sessionctl -n "$of export" -x -l format -a 'oci squashfs' -d 'of the file'
complete -c sessionctl -n "$of persist" -l no-verify -d 'do not read back what was written'
complete -c sessionctl -n "$of rebase" -x -l conflicts -a 'keep drop save' -d 'what becomes of what both have changed'
complete -c sessionctl -n "$of rebase" -l remount -d 'also if it is in use'
complete -c sessionctl -n "$of uncommit" -l delete -d 'delete what is kept there'
complete -c sessionctl -n "$of diff" -x -l from -a '(__sessionctl_snapshots)' -d 'compare with this'
complete -c sessionctl -n "$of diff" -x -l to -a '(__sessionctl_snapshots)' -d 'compare this'
complete -c sessionctl -n "$of diff" -l list -d 'a line for each path'
complete -c sessionctl -n "$of diff" -l content -d 'how the text of files differs'
complete -c sessionctl -n "$of diff" -x -l directories -d 'where most has changed'
complete -c sessionctl -n "$of diff" -x -l depth -d 'down to this level'
complete -c sessionctl -n "$of maintenance" -x -l message -d 'what sessions are told'
complete -c sessionctl -n "$of check" -l repair -d 'mend what can be without risk'
complete -c sessionctl -n "$of check" -r -F -l config -d 'the configuration'
complete -c sessionctl -n "$of check" -x -l state-directory -a '(__fish_complete_directories)' -d 'sessions in it'
complete -c sessionctl -n "$of check" -x -l upper -a '(__fish_complete_directories)' -d 'the upper'
complete -c sessionctl -n "$of check" -x -l work -a '(__fish_complete_directories)' -d 'its workdir'
complete -c sessionctl -n "$of check" -x -l lower -a '(__fish_complete_directories)' -d 'the lowers'
complete -c sessionctl -n "$of check" -l userxattr -d 'it was written with that option'
