/* Cockpit's own library is a script, not a module; the page has loaded it. */
export default window.cockpit;
