/* Light or dark, as the user has chosen in Cockpit's menu. */

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function apply() {
    const chosen = localStorage.getItem("shell:style") || "auto";
    const isDark = chosen === "dark" || (chosen === "auto" && dark.matches);
    document.documentElement.classList.toggle("dark", isDark);
}

/* Apply what is chosen, now and whenever that changes. */
export function followTheme() {
    window.addEventListener("storage", event => event.key === "shell:style" && apply());
    window.addEventListener("cockpit-style", apply);
    dark.addEventListener("change", apply);
    apply();
}
