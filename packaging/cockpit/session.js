/* One session: its row, and what is below that once it has been opened. */

import * as actions from "./actions.js";
import cockpit from "./cockpit.js";
import { h } from "./dom.js";
import { isMounted } from "./service.js";
import * as words from "./words.js";

const _ = cockpit.gettext;

export const COLUMNS = () => [
    _("Session"), _("User"), _("Profile"), _("Storage"), _("State"), _("Use"), _("Next reset"), "",
];

/* Return the rows of a table for a session; `toggle` opens or closes it. */
export function rows(service, session, opened, toggle, act) {
    const job = service.job(session);
    const running = job?.State === "running";
    const row = h(
        "tr", { "data-key": session.path, class: opened ? "open" : "" },
        h("th", { scope: "row" },
          h("button", { class: "toggle", "aria-expanded": String(opened), onclick: toggle },
            h("bdi", {}, session.Id))),
        h("td", {}, h("bdi", {}, session.User)),
        h("td", {}, session.Profile),
        h("td", {}, words.storage(session.Storage)),
        h("td", {}, running ? progress(service, job, act) : state(session, job)),
        h("td", {}, use(session)),
        h("td", {}, nextReset(session)),
        h("td", {}, h("button", {
            class: "danger", disabled: running, onclick: () => actions.reset(service, session),
        }, _("Reset"))));
    if (!opened)
        return [row];
    const details = h("tr", { "data-key": `${session.path} details`, class: "details" },
                      h("td", { colspan: COLUMNS().length },
                        facts(session),
                        changes(service, session),
                        snapshots(service, session, running)));
    return [row, details];
}

function state(session, job) {
    const label = h("span", { class: `label ${session.State}` }, words.state(session.State));
    const why = session.Failure || failed(job);
    return why ? h("div", {}, label, h("small", { class: "failure" }, why)) : label;
}

function failed(job) {
    if (job?.State !== "failed")
        return "";
    return cockpit.format(_("$0 has failed. $1"), words.operation(job.Operation), job.ErrorMessage);
}

export function progress(service, job, act) {
    const cancel = h("button", {
        class: "link", onclick: () => act(() => service.call(job.path, "Job", "Cancel", [])),
    }, _("Cancel"));
    const name = words.operation(job.Operation);
    const told = job.ProgressValid ? `${name}, ${words.share(job.Progress, 1)}` : name;
    const value = job.ProgressValid ? job.Progress : null;
    return h("div", { class: "job" },
             h("span", {}, told), cancel, h("progress", { value, "aria-label": told }));
}

function use(session) {
    const used = words.size(session.BytesUsed);
    if (session.BytesLimit === 0)
        return h("span", {}, cockpit.format(_("$0 on its disk"), used));
    const told = cockpit.format(_("$0 of $1 ($2)"), used, words.size(session.BytesLimit),
                                words.share(session.BytesUsed, session.BytesLimit));
    return h("div", { class: `use ${session.SpaceLevel}` },
             h("meter", { max: session.BytesLimit, value: session.BytesUsed, "aria-label": told }),
             h("span", {}, told));
}

function nextReset(session) {
    if (session.NextReset) {
        return h("span", {}, `${words.when(session.NextReset)}, `,
                 words.reason(session.NextResetReason));
    }
    const holding = session.Inhibitors.map(([who, why]) => (why ? `${who}: ${why}` : who));
    return h("span", {}, holding.length > 0
        ? cockpit.format(_("held back by $0"), holding.join(", "))
        : "");
}

function facts(session) {
    const told = [
        [_("Mount point"), session.MountPoint],
        [_("Image"), session.Image],
        [_("Made"), words.when(session.CreatedAt)],
        [_("Last reset"), words.when(session.LastReset)],
        [_("Outlives resets"), session.Keep.join(", ") || _("nothing")],
    ];
    if (session.Pending > 0) {
        told.push([_("In RAM still"), cockpit.format(
            cockpit.ngettext("What is written to $0 open file", "What is written to $0 open files",
                             session.Pending),
            session.Pending)]);
    }
    return h("section", { class: "facts" },
             h("dl", {}, told.map(([name, value]) =>
                 h("div", {}, h("dt", {}, name), h("dd", {}, h("bdi", {}, value))))));
}

function changes(service, session) {
    const known = service.changes.get(session.path);
    const told = [];
    if (!known) {
        told.push(h("p", {}, isMounted(session) ? _("Counting…") : _("It is not mounted.")));
    } else if (known.error) {
        told.push(h("p", {}, words.failure(known.error)));
    } else {
        told.push(h("p", {}, words.changes(known.summary)));
        told.push(h("ul", {}, known.summary.largest.slice(0, 5).map(([path, , bytes]) =>
            h("li", {}, h("bdi", {}, path), ` (${words.size(bytes)})`))));
    }
    return h("section", { class: "changes" }, h("h3", {}, _("Since the image")), told);
}

function snapshots(service, session, running) {
    const found = service.snapshots(session);
    const make = h("button", {
        class: "secondary",
        disabled: running,
        onclick: () => actions.takeSnapshot(service, session),
    }, _("Make a snapshot…"));
    const table = h(
        "table", { class: "snapshots" },
        h("thead", {}, h("tr", {},
                         [_("Name"), _("Made"), _("Size"), _("Gives back"), _("Kind"), ""].map(
                             title => h("th", { scope: "col" }, title)))),
        h("tbody", {}, found.map(snapshot => h(
            "tr", { "data-key": snapshot.path },
            h("th", { scope: "row" }, h("bdi", {}, snapshot.Name),
              h("small", {}, snapshot.Description)),
            h("td", {}, words.when(snapshot.CreatedAt)),
            h("td", {}, snapshot.SizeValid ? words.size(snapshot.Size) : _("Counting…")),
            h("td", {}, snapshot.SizeValid ? words.size(snapshot.Exclusive) : ""),
            h("td", {}, kinds(snapshot)),
            h("td", {},
              h("button", {
                  class: "secondary",
                  disabled: running,
                  onclick: () => actions.restore(service, session, snapshot),
              }, _("Restore…")),
              h("button", {
                  class: "link",
                  disabled: running,
                  onclick: () => actions.deleteSnapshot(service, snapshot),
              }, _("Delete…")))))));
    return h("section", { class: "snapshot-list" },
             h("header", {}, h("h3", {}, _("Snapshots")), make),
             found.length > 0 ? table : h("p", {}, _("There are none.")));
}

function kinds(snapshot) {
    const told = [];
    if (snapshot.Automatic)
        told.push(_("automatic"));
    if (snapshot.Pinned)
        told.push(_("pinned"));
    return told.join(", ");
}
