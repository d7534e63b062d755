/* Questions before something is done. */

import cockpit from "./cockpit.js";
import { h } from "./dom.js";
import { failure } from "./words.js";

const _ = cockpit.gettext;

/* Ask; `act` is called, with the form's fields, by the button named `action`.

   The dialog stays while that goes on, and if it fails, then with the reason. */
export function ask({ title, text = [], fields = [], action, danger = false, act }) {
    const complaint = h("p", { class: "alert danger", role: "alert", hidden: true });
    const proceed = h("button", { class: danger ? "danger" : "primary", type: "submit" }, action);
    const dialog = h(
        "dialog", { "aria-labelledby": "dialog-title" },
        h("form", { method: "dialog" },
          h("h2", { id: "dialog-title" }, title),
          complaint,
          text.map(paragraph => h("p", {}, paragraph)),
          fields,
          h("footer", {},
            proceed,
            h("button", {
                type: "button", class: "link", autofocus: danger, onclick: () => dialog.close(),
            }, _("Cancel")))));
    dialog.querySelector("form").onsubmit = async event => {
        event.preventDefault();
        proceed.disabled = true;
        try {
            await act(dialog.querySelector("form").elements);
            dialog.close();
        } catch (error) {
            complaint.textContent = failure(error);
            complaint.hidden = false;
            proceed.disabled = false;
        }
    };
    dialog.onclose = () => dialog.remove();
    document.body.append(dialog);
    dialog.showModal();
    return dialog;
}

export function checkbox(name, label, note = null) {
    return h("label", { class: "choice" },
             h("input", { type: "checkbox", name }),
             h("span", {}, label, note));
}

export function textField(name, label, attributes = {}) {
    return h("label", { class: "field" }, h("span", {}, label),
             h("input", { type: "text", name, autocomplete: "off", ...attributes }));
}

export function choice(name, label, values) {
    return h("label", { class: "field" }, h("span", {}, label),
             h("select", { name }, values.map(value => h("option", { value }, value))));
}
