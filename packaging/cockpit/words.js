/* What people read: sizes, times, and the daemon's words in their language. */

import cockpit from "./cockpit.js";

const _ = cockpit.gettext;

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/* The language in the form that Intl knows. */
const language = (cockpit.language || "en").replace("_", "-");

const date = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
const decimal = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat(language, { style: "percent" });

export function size(bytes) {
    const power = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), UNITS.length - 1);
    return `${decimal.format(bytes / 1024 ** power)} ${UNITS[power]}`;
}

/* Microseconds since 1970; 0 is never. */
export function when(moment) {
    return moment ? date.format(new Date(moment / 1000)) : _("never");
}

export function share(part, whole) {
    return percent.format(part / whole);
}

export function storage(kind) {
    return { tmpfs: _("in RAM"), persistent: _("on disk") }[kind] || kind;
}

export function state(name) {
    return {
        starting: _("starting"),
        active: _("active"),
        busy: _("busy"),
        inactive: _("inactive"),
        failed: _("failed"),
        closing: _("closing"),
    }[name] || name;
}

export function operation(name) {
    return {
        reset: _("Reset"),
        restore: _("Restore"),
        persist: _("Move to disk"),
        rebase: _("Rebase"),
        maintenance: _("New image"),
        export: _("Export"),
        import: _("Import"),
        commit: _("Commit"),
    }[name] || name;
}

export function reason(name) {
    return {
        scheduled: _("scheduled"),
        after: _("by its age"),
        daily: _("daily"),
        idle: _("when nobody is there"),
    }[name] || name;
}

/* Say how much differs, of an answer of Changes. */
export function changes(summary) {
    const counts = [
        [summary.added, count => cockpit.ngettext("$0 added", "$0 added", count)],
        [summary.changed, count => cockpit.ngettext("$0 changed", "$0 changed", count)],
        [summary.deleted, count => cockpit.ngettext("$0 deleted", "$0 deleted", count)],
        [summary.renamed, count => cockpit.ngettext("$0 renamed", "$0 renamed", count)],
    ].filter(([count]) => count > 0);
    if (counts.length === 0)
        return _("Nothing differs from the image.");
    const told = counts.map(([count, words]) => cockpit.format(words(count), count)).join(", ");
    return cockpit.format(_("$0; $1 in files"), told, size(summary.bytes));
}

/* Say what went wrong, of an error of the bus or of Cockpit, and what to do. */
export function failure(error) {
    const told = error.message || error.problem || String(error);
    const name = error.name || "";
    if (name.endsWith(".NotAuthorized") || name.endsWith(".InteractiveAuthorizationRequired")) {
        return told + " " + _("In Cockpit, that takes administrative access: turn it on at the " +
                              "top of the page.");
    }
    return told;
}
