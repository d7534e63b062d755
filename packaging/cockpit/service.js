/* A copy of what sessiond's D-Bus objects are, which follows its signals. */

import cockpit from "./cockpit.js";

export const NAME = "org.sessiond.Overlay1";
export const ROOT = "/org/sessiond/Overlay1";

const PROPERTIES = "org.freedesktop.DBus.Properties";
const OBJECTS = "org.freedesktop.DBus.ObjectManager";

/* Milliseconds between questions for what no signal tells. */
const CALM = 5000;

/* Whether there is something to be seen in a session. */
export function isMounted(session) {
    return !["starting", "failed", "inactive"].includes(session.State);
}

/* Calls wait for jobs to be given up, layers to be mounted, and people to type passwords. */
const TIMEOUT = 330 * 1000;

export class Service {
    /* `changed` is called after each change of what is here. */
    constructor(changed) {
        this.changed = changed;
        // The bus tells when sessiond comes and goes. To ask for it again and again would start it.
        cockpit.dbus("org.freedesktop.DBus", { bus: "system" }).subscribe(
            { interface: "org.freedesktop.DBus", member: "NameOwnerChanged", arg0: NAME },
            (_path, _interface, _member, [, , owner]) =>
                owner ? this.start() : this.lose({ problem: "not-found" }));
        this.objects = new Map();
        /* What is asked for only where somebody looks: how these sessions, by path, differ. */
        this.watched = new Set();
        this.changes = new Map();
        /* Why there is nothing: an error, or null. */
        this.problem = null;
        this.known = false;
        this.refreshing = false;
        this.again = false;
        /* Signals that came while everything is asked for; else null. */
        this.heard = null;
    }

    /* Connect, with the rights that the user has in Cockpit now. */
    start() {
        this.client?.close();
        const client = cockpit.dbus(NAME, { bus: "system", superuser: "try" });
        this.client = client;
        client.addEventListener("close", (_event, options) => {
            if (client === this.client)
                this.lose(options);
        });
        client.subscribe({ path_namespace: ROOT }, (path, interface_, member, values) =>
            this.hear(path, interface_, member, values));
        this.changes.clear();
        this.read();
        this.refresh();
    }

    /* Ask for everything, which starts sessiond where the bus can.

       What signals tell meanwhile is heard after the answer: it is news, or repeats how the answer
       came about, and ends with the same. */
    async read() {
        const client = this.client;
        const heard = [];
        this.heard = heard;
        try {
            const [manager] = await client.call(ROOT, PROPERTIES, "GetAll", [`${NAME}.Manager`]);
            const [objects] = await client.call(ROOT, OBJECTS, "GetManagedObjects", []);
            if (heard !== this.heard) // sessiond has ended meanwhile, or everything is asked anew
                return;
            this.objects = new Map([[ROOT, plain(manager)]]);
            for (const [path, interfaces] of Object.entries(objects))
                this.add(path, interfaces);
            this.heard = null;
            heard.forEach(signal => this.hear(...signal));
            this.problem = null;
            this.known = true;
            this.changed();
        } catch (error) {
            if (heard === this.heard)
                this.lose(error);
        }
    }

    lose(error) {
        this.heard = null;
        this.objects.clear();
        this.changes.clear();
        this.problem = error;
        this.known = true;
        this.changed();
    }

    add(path, interfaces) {
        for (const [name, values] of Object.entries(interfaces)) {
            if (name.startsWith(NAME))
                this.objects.set(path, plain(values));
        }
    }

    hear(path, interface_, member, values) {
        if (this.heard !== null)
            this.heard.push([path, interface_, member, values]);
        else if (interface_ === PROPERTIES && this.objects.has(path))
            Object.assign(this.objects.get(path), plain(values[1]));
        else if (interface_ === OBJECTS && member === "InterfacesAdded")
            this.add(values[0], values[1]);
        else if (interface_ === OBJECTS && member === "InterfacesRemoved")
            this.objects.delete(values[0]);
        if (member === "Completed")
            this.refresh(); // the session is another by now
        this.changed();
    }

    /* Ask for what no signal tells: now, and then over and over while somebody looks at the page. */
    async refresh() {
        if (this.refreshing) {
            this.again = true;
            return;
        }
        clearTimeout(this.timer);
        this.refreshing = true;
        this.again = false;
        if (!document.hidden) {
            for (const path of this.paths("session"))
                await this.measure(path);
            await Promise.all([...this.watched].map(path => this.compare(path)));
            this.changed();
        }
        this.refreshing = false;
        this.timer = setTimeout(() => this.refresh(), this.again ? 0 : CALM);
    }

    /* Ask how full a session is. */
    async measure(path) {
        try {
            const [values] = await this.client.call(path, PROPERTIES, "GetAll", [`${NAME}.Session`]);
            const { BytesUsed, InodesUsed } = plain(values);
            Object.assign(this.objects.get(path) || {}, { BytesUsed, InodesUsed });
        } catch {
            // It has ended; its signal is on the way.
        }
    }

    /* Ask how a session differs from its image; who is refused once is not asked for again. */
    async compare(path) {
        const before = this.changes.get(path);
        const session = this.objects.get(path);
        if (before?.refused || !session || !isMounted(session))
            return;
        try {
            const [summary] = await this.look(path, "Session", "Changes", [{}]);
            this.changes.set(path, { summary: plain(summary) });
        } catch (error) {
            this.changes.set(path, { error, refused: (error.name || "").includes("Authoriz") });
        }
    }

    /* Have a session compared from now on, or no longer. */
    async watch(path, yes) {
        if (!yes) {
            this.watched.delete(path);
            return;
        }
        this.watched.add(path);
        await this.compare(path);
        this.changed();
    }

    /* Call a method that changes something; a password may be asked for. */
    call(path, interface_, method, values) {
        const options = { flags: "i", timeout: TIMEOUT };
        return this.client.call(path, `${NAME}.${interface_}`, method, values, options);
    }

    /* Call a method that only tells something, for which nobody is asked for a password. */
    look(path, interface_, method, values) {
        const options = { timeout: TIMEOUT };
        return this.client.call(path, `${NAME}.${interface_}`, method, values, options);
    }

    /* The paths of all sessions, or of one's snapshots: `below` is where they are. */
    paths(kind, below = ROOT) {
        const start = `${below}/${kind}/`;
        return [...this.objects.keys()].filter(
            path => path.startsWith(start) && !path.slice(start.length).includes("/"));
    }

    get manager() {
        const manager = this.objects.get(ROOT);
        return manager && { path: ROOT, ...manager };
    }

    get sessions() {
        return this.paths("session")
                .map(path => ({ path, ...this.objects.get(path) }))
                .sort((one, other) => (one.Id < other.Id ? -1 : 1));
    }

    snapshots(session) {
        return this.paths("snapshot", session.path)
                .map(path => ({ path, ...this.objects.get(path) }))
                .sort((one, other) => other.CreatedAt - one.CreatedAt);
    }

    /* The job that runs on a session, or else ran last; undefined if none did. */
    job(session) {
        const job = this.objects.get(session.LastJob);
        return job && { path: session.LastJob, ...job };
    }
}

/* Return a dictionary of variants as their values. */
function plain(values) {
    return Object.fromEntries(Object.entries(values).map(([key, value]) => [key, value.v]));
}
