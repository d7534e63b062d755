/* What the buttons ask for. */

import cockpit from "./cockpit.js";
import { ask, checkbox, choice, textField } from "./dialogs.js";
import { h } from "./dom.js";

const _ = cockpit.gettext;

/* Begin to reset, or restore, and remain until the daemon has said yes. */
async function start(service, session, method, values, elements) {
    const options = {};
    if (elements.terminate.checked)
        options.terminate = cockpit.variant("b", true);
    if (elements["snapshot-first"]?.checked)
        options["snapshot-first"] = cockpit.variant("b", true);
    await service.call(session.path, "Session", method, [...values, options]);
}

/* Which programs would be ended; they are named once they have been found. */
function terminate(service, session) {
    const programs = h("small");
    service.look(session.path, "Session", "Conflicts", [])
            .then(([found]) => {
                const names = found.map(([name, pids]) => `${name} (${pids.join(", ")})`);
                programs.textContent = names.length > 0
                    ? cockpit.format(_("Now these do: $0"), names.join(", "))
                    : _("Now none does.");
            })
            .catch(() => { programs.textContent = "" });
    return checkbox("terminate", _("End the programs that use the session first"), programs);
}

export function reset(service, session) {
    ask({
        title: cockpit.format(_("Reset $0?"), session.Id),
        text: [
            cockpit.format(_("The session of $0 goes back to its image. What was changed since is " +
                             "lost, but for what is kept by rules and in snapshots."), session.User),
        ],
        fields: [
            checkbox("snapshot-first", _("Keep a snapshot of it as it is now")),
            terminate(service, session),
        ],
        action: _("Reset"),
        danger: true,
        act: elements => start(service, session, "Reset", [], elements),
    });
}

export function restore(service, session, snapshot) {
    ask({
        title: cockpit.format(_("Restore $0?"), snapshot.Name),
        text: [
            cockpit.format(_("The session $0 goes back to what it was at that snapshot. What it is " +
                             "now is kept as a snapshot."), session.Id),
        ],
        fields: [terminate(service, session)],
        action: _("Restore"),
        act: elements => start(service, session, "Restore", [snapshot.Name], elements),
    });
}

export function takeSnapshot(service, session) {
    ask({
        title: cockpit.format(_("Make a snapshot of $0"), session.Id),
        fields: [
            textField("name", _("Name"), { required: true, maxlength: 64 }),
            textField("description", _("Description"), { maxlength: 1000 }),
            checkbox("pinned", _("Keep it until somebody deletes it")),
        ],
        action: _("Make a snapshot"),
        act: elements => service.call(session.path, "Session", "Snapshot", [elements.name.value, {
            description: cockpit.variant("s", elements.description.value),
            pinned: cockpit.variant("b", elements.pinned.checked),
        }]),
    });
}

export function deleteSnapshot(service, snapshot) {
    ask({
        title: cockpit.format(_("Delete $0?"), snapshot.Name),
        text: [_("What only this snapshot keeps is lost.")],
        action: _("Delete"),
        danger: true,
        act: () => service.call(snapshot.path, "Snapshot", "Delete", []),
    });
}

export function beginMaintenance(service) {
    ask({
        title: _("Begin maintenance"),
        text: [_("Root gets a session on the image of a profile. Until that has ended, no other " +
                 "sessions are made.")],
        fields: [
            choice("profile", _("Profile"), service.manager.Profiles),
            textField("message", _("Message to users"), { maxlength: 1000 }),
        ],
        action: _("Begin maintenance"),
        act: elements => service.call(
            service.manager.path, "Manager", "BeginMaintenance",
            [elements.profile.value, elements.message.value, {}]),
    });
}

export function finishMaintenance(service) {
    ask({
        title: _("Make the new image?"),
        text: [_("It is made of the session as it is now, and put in the place of the old one. " +
                 "Sessions that there are go on with the image they have.")],
        action: _("Make the new image"),
        act: () => service.call(service.manager.path, "Manager", "FinishMaintenance", [{}]),
    });
}

export function cancelMaintenance(service) {
    ask({
        title: _("Give the maintenance up?"),
        text: [_("What was changed in its session is lost. The image is as it was.")],
        action: _("Give up"),
        danger: true,
        act: () => service.call(service.manager.path, "Manager", "CancelMaintenance", [{}]),
    });
}
