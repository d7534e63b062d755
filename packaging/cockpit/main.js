/* The page: all sessions, and the maintenance of images. */

import * as actions from "./actions.js";
import cockpit from "./cockpit.js";
import { h, morph } from "./dom.js";
import { Service } from "./service.js";
import { COLUMNS, progress, rows } from "./session.js";
import { followTheme } from "./theme.js";
import { failure } from "./words.js";

const _ = cockpit.gettext;

const opened = new Set();
const permission = cockpit.permission({ admin: true });
const service = new Service(draw);
let complaint = "";
let drawing = false;

/* Draw soon: all that comes at once is drawn at once. */
function draw() {
    if (drawing)
        return;
    drawing = true;
    requestAnimationFrame(() => {
        drawing = false;
        morph(document.getElementById("page"), page());
    });
}

/* Do what a button without a dialog asks for. */
async function act(action) {
    complaint = "";
    try {
        await action();
    } catch (error) {
        complaint = failure(error);
    }
    draw();
}

function toggle(path) {
    const opens = !opened.delete(path);
    if (opens)
        opened.add(path);
    service.watch(path, opens);
    draw();
}

function page() {
    return h("main", { id: "page" }, ...content());
}

function content() {
    if (!service.known)
        return [h("p", { class: "empty" }, _("Asking sessiond…"))];
    if (service.problem)
        return [away(service.problem)];
    const sessions = service.sessions;
    return [
        h("header", { class: "title" },
          h("h1", {}, _("Sessions")),
          service.manager.Maintenance === "" && h("button", {
              class: "secondary", onclick: () => actions.beginMaintenance(service),
          }, _("Begin maintenance…"))),
        permission.allowed === false && h("p", { class: "alert info" },
            _("You have limited access, and can change your own sessions only. Turn on " +
              "administrative access at the top of the page for the others.")),
        complaint !== "" && h("p", { class: "alert danger", role: "alert" }, complaint),
        service.manager.Maintenance !== "" && maintenance(sessions),
        sessions.length > 0 ? table(sessions) : h("p", { class: "empty" },
            _("There are no sessions. They are made at login, by 'sessionctl create', or over D-Bus.")),
    ];
}

function away(problem) {
    return h("div", { class: "empty" },
             h("h1", {}, _("sessiond does not answer")),
             h("p", {}, _("It is not installed on this machine, or has ended. 'systemctl status " +
                          "sessiond' says why, and 'systemctl start sessiond' starts it.")),
             h("p", {}, h("small", {}, problem.message || "")),
             h("button", { class: "primary", onclick: () => service.start() }, _("Try again")));
}

function maintenance(sessions) {
    const { Maintenance: profile, MaintenanceMessage: message } = service.manager;
    const session = sessions.find(one => one.path === service.manager.MaintenanceSession);
    const job = session && service.job(session);
    const running = job?.State === "running";
    return h("section", { class: "alert info maintenance" },
             h("h2", {}, cockpit.format(_("The image of $0 is being maintained"), profile)),
             h("p", {}, h("bdi", {}, message)),
             running && progress(service, job, act),
             h("button", {
                 class: "primary", disabled: running,
                 onclick: () => actions.finishMaintenance(service),
             }, _("Make the new image…")),
             h("button", {
                 class: "link", disabled: running,
                 onclick: () => actions.cancelMaintenance(service),
             }, _("Give up…")));
}

function table(sessions) {
    return h("table", { class: "sessions" },
             h("thead", {}, h("tr", {},
                              COLUMNS().map(title => h("th", { scope: "col" }, title)))),
             h("tbody", {}, sessions.flatMap(session => rows(
                 service, session, opened.has(session.path), () => toggle(session.path), act))));
}

followTheme();
document.documentElement.lang = cockpit.language || "en";
document.title = _("Sessions");
permission.addEventListener("changed", () => service.start());
draw();
if (permission.allowed !== null)
    service.start();
