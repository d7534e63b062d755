# Completion of sessionctl for bash: as /usr/share/bash-completion/completions/sessionctl.

# The first column of a table. Nobody is asked for a password by these.
_sessionctl_names() {
    LC_ALL=C sessionctl "$@" 2>/dev/null | sed '1d; s/ .*//'
}

_sessionctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local commands='list status create reset schedule-reset cancel-reset inhibit conflicts snapshot
        snapshots restore edit-snapshot delete-snapshot export import persist rebase shadowed commit
        uncommit committed keep diff wait cancel close maintenance guest run shell check monitor top'
    local switch='--terminate --grace --snapshot-first --snapshot-as'
    local command='' options='' valued='' word index arguments=()
    COMPREPLY=()

    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${COMP_WORDS[index]} == [a-z]* ]]; then
            command=${COMP_WORDS[index]}
            break
        fi
    done
    case $command in
        '') options='--version' ;;
        list | status | conflicts | snapshots | shadowed | committed | monitor) options='--json' ;;
        create) options='--json --id' ;;
        reset) options="$switch --keep" ;;
        schedule-reset) options="$switch --keep --at --in --idle --warning" ;;
        inhibit) options='--why' ;;
        snapshot) options='--json --description --pin' ;;
        restore) options="$switch --no-undo" ;;
        edit-snapshot) options='--name --description --pin --no-pin' ;;
        export) options='--format' ;;
        import) options='--description' ;;
        persist) options='--no-verify' ;;
        rebase) options='--conflicts --remount' ;;
        uncommit) options='--delete' ;;
        diff) options='--json --from --to --list --content --directories --depth' ;;
        maintenance) options='--json --message --id' ;;
        guest) options='--json' ;;
        check)
            options='--json --repair --config --state-directory --upper --work --lower --userxattr'
            ;;
    esac
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$commands $options --help" -- "$current")
        return
    fi

    # What follows "--" is another program's.
    for ((word = index + 1; word < COMP_CWORD; word++)); do
        if [[ ${COMP_WORDS[word]} == -- ]]; then
            _sessionctl_program "$((word + 1))"
            return
        fi
    done
    valued='--id --grace --snapshot-as --keep --at --in --idle --warning --why --description --name
        --format --conflicts --from --to --directories --depth --message --config --state-directory
        --upper --work --lower'
    for ((word = index + 1; word < COMP_CWORD; word++)); do
        case ${COMP_WORDS[word]} in
            -*) [[ " ${valued//$'\n'/ } " != *" ${COMP_WORDS[word]} "* ]] || ((word++)) ;;
            *) arguments+=("${COMP_WORDS[word]}") ;;
        esac
    done

    case $previous in
        --from | --to)
            _sessionctl_snapshots "${arguments[0]:-}"
            return
            ;;
        --format)
            mapfile -t COMPREPLY < <(compgen -W 'oci squashfs' -- "$current")
            return
            ;;
        --conflicts)
            mapfile -t COMPREPLY < <(compgen -W 'keep drop save' -- "$current")
            return
            ;;
        --config)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --state-directory | --upper | --work | --lower)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -d -- "$current")
            return
            ;;
    esac
    [[ " ${valued//$'\n'/ } " != *" $previous "* ]] || return 0
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options --help" -- "$current")
        return
    fi

    case $command:${#arguments[@]} in
        create:0) mapfile -t COMPREPLY < <(compgen -u -- "$current") ;;
        maintenance:0)
            mapfile -t COMPREPLY < <(compgen -W 'begin finish cancel status' -- "$current")
            ;;
        guest:0) mapfile -t COMPREPLY < <(compgen -W 'add remove list' -- "$current") ;;
        guest:1)
            [[ ${arguments[0]} != remove ]] ||
                mapfile -t COMPREPLY < <(compgen -W "$(sessionctl guest list 2>/dev/null)" -- "$current")
            ;;
        list:* | monitor:* | top:* | create:* | maintenance:* | guest:*) ;;
        *:0) mapfile -t COMPREPLY < <(compgen -W "$(_sessionctl_names list)" -- "$current") ;;
        restore:1 | edit-snapshot:1 | delete-snapshot:1 | export:1)
            _sessionctl_snapshots "${arguments[0]}"
            ;;
        export:2 | import:2)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            ;;
    esac
}

_sessionctl_snapshots() {
    [[ -z $1 ]] ||
        mapfile -t COMPREPLY < <(compgen -W "$(_sessionctl_names snapshots "$1")" -- "$current")
}

# Completes a command that begins at the given word, as it would be by itself, where bash-completion is there.
_sessionctl_program() {
    if declare -F _command_offset >/dev/null; then
        _command_offset "$1"
    elif ((COMP_CWORD == $1)); then
        mapfile -t COMPREPLY < <(compgen -c -- "$current")
    fi
}

complete -F _sessionctl sessionctl
