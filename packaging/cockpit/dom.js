/* Elements, and changing those on the page into others without losing focus or scroll position. */

/* Make an element. Attributes that are false or null are left out; `onclick` is a function. */
export function h(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
        if (typeof value === "function")
            element[key] = value;
        else if (value !== false && value !== null && value !== undefined)
            element.setAttribute(key, value === true ? "" : value);
    }
    // Strings become text, so that no name can be markup.
    element.append(...children.flat().filter(child => child !== null && child !== false));
    return element;
}

/* Change `old` into `fresh`; elements with the same `data-key` are the same, wherever they are. */
export function morph(old, fresh) {
    if (old.nodeName !== fresh.nodeName) {
        old.replaceWith(fresh);
        return;
    }
    if (old.nodeType === Node.TEXT_NODE) {
        if (old.data !== fresh.data)
            old.data = fresh.data;
        return;
    }
    for (const { name } of [...old.attributes]) {
        if (!fresh.hasAttribute(name))
            old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
        if (old.getAttribute(name) !== value)
            old.setAttribute(name, value);
    }
    old.onclick = fresh.onclick;
    morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.children) {
        if (child.dataset.key)
            keyed.set(child.dataset.key, child);
    }
    let next = old.firstChild;
    for (const child of [...fresh.childNodes]) {
        const key = child.dataset?.key;
        const same = key ? keyed.get(key) : next?.dataset?.key ? null : next;
        if (!same) {
            old.insertBefore(child, next);
        } else {
            if (same === next)
                next = next.nextSibling;
            else
                old.insertBefore(same, next);
            morph(same, child);
        }
    }
    while (next) {
        const after = next.nextSibling;
        next.remove();
        next = after;
    }
}
