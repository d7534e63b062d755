/* The Python module; sessiond/fuse/_kernel_io.pyi says what each function does. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernel_io.h"

#include <errno.h>
#include <string.h>

/* The lock is held while the image's disk is read: let other Python threads run meanwhile. */
static void lock(void)
{
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&state.lock);
    Py_END_ALLOW_THREADS
}

static void unlock(void)
{
    pthread_mutex_unlock(&state.lock);
}

/* Take the lock and find a node by its number; NULL if there is none. False, without the lock and with
 * an exception set, if the argument is no number. */
static bool lock_and_find(PyObject *argument, struct node **node)
{
    uint64_t number = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return false;
    lock();
    *node = node_find(number);
    return true;
}

static PyObject *configure(PyObject *self, PyObject *args)
{
    const char *path;
    if (!PyArg_ParseTuple(args, "s:configure", &path))
        return NULL;
    lock();
    state.path = !strcmp(path, "passthrough") ? PASSTHROUGH : !strcmp(path, "cached") ? CACHED : PLAIN;
    unlock();
    Py_RETURN_NONE;
}

static PyObject *record(PyObject *self, PyObject *args)
{
    int device, journal, inherits;
    if (!PyArg_ParseTuple(args, "iip:record", &device, &journal, &inherits))
        return NULL;
    lock();
    state.device = device;
    bool recorded = journal_open(journal) && (!inherits || journal_inherit());
    unlock();
    return PyBool_FromLong(recorded);
}

static PyObject *key(PyObject *self, PyObject *unused)
{
    return PyBytes_FromStringAndSize(journal_key(), JOURNAL_KEY);
}

static PyObject *placed(PyObject *self, PyObject *args)
{
    unsigned long long number, parent;
    unsigned int type;
    Py_buffer name;
    if (!PyArg_ParseTuple(args, "KIKy*:placed", &number, &type, &parent, &name))
        return NULL;
    lock();
    journal_placed(number, type, parent, name.buf, name.len);
    unlock();
    PyBuffer_Release(&name);
    Py_RETURN_NONE;
}

static PyObject *removed(PyObject *self, PyObject *args)
{
    unsigned long long number, parent;
    Py_buffer name;
    if (!PyArg_ParseTuple(args, "KKy*:removed", &number, &parent, &name))
        return NULL;
    lock();
    journal_removed(number, parent, name.buf, name.len);
    unlock();
    PyBuffer_Release(&name);
    Py_RETURN_NONE;
}

static PyObject *note(PyObject *self, PyObject *args)
{
    unsigned long long number;
    unsigned int which;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "KIy*:note", &number, &which, &data))
        return NULL;
    lock();
    bool noted = journal_fact(number, which, data.buf, data.len);
    unlock();
    PyBuffer_Release(&data);
    return PyBool_FromLong(noted);
}

/* Append (number, type, [(parent, name), ...], {which: data, ...}). */
static void append_inherited(const struct life *life, void *list)
{
    PyObject *names = PyList_New(0), *facts = PyDict_New(), *item = NULL;
    for (const struct life_name *name = life->names; names && name; name = name->next) {
        PyObject *pair = Py_BuildValue("Ky#", (unsigned long long)name->parent, name->bytes,
                                       (Py_ssize_t)name->length);
        if (!pair || PyList_Append(names, pair))
            Py_CLEAR(names);
        Py_XDECREF(pair);
    }
    for (const struct life_fact *fact = life->facts; facts && fact; fact = fact->next) {
        PyObject *which = PyLong_FromUnsignedLong(fact->which);
        PyObject *data = PyBytes_FromStringAndSize(fact->data, fact->length);
        if (!which || !data || PyDict_SetItem(facts, which, data))
            Py_CLEAR(facts);
        Py_XDECREF(which);
        Py_XDECREF(data);
    }
    if (names && facts)
        item = Py_BuildValue("KIOO", (unsigned long long)life->number, life->type, names, facts);
    if (item)
        PyList_Append(list, item);
    Py_XDECREF(item);
    Py_XDECREF(names);
    Py_XDECREF(facts);
}

static PyObject *inherited(PyObject *self, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    if (!list)
        return NULL;
    lock();
    journal_inherited(append_inherited, list);
    unlock();
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

static void append_listing(uint64_t handle, uint64_t number, void *list)
{
    PyObject *pair = Py_BuildValue("KK", (unsigned long long)handle, (unsigned long long)number);
    if (pair)
        PyList_Append(list, pair);
    Py_XDECREF(pair);
}

static PyObject *inherited_listings(PyObject *self, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    if (!list)
        return NULL;
    lock();
    listing_each_inherited(append_listing, list);
    unlock();
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

static PyObject *last_listing(PyObject *self, PyObject *unused)
{
    return PyLong_FromUnsignedLongLong(listing_last());
}

static PyObject *reopen_listing(PyObject *self, PyObject *args)
{
    unsigned long long handle, numbering;
    int fd;
    if (!PyArg_ParseTuple(args, "KiK:reopen_listing", &handle, &fd, &numbering))
        return NULL;
    lock();
    bool reopened = listing_reopen(handle, fd, numbering);
    unlock();
    return PyBool_FromLong(reopened);
}

static PyObject *resent(PyObject *self, PyObject *unused)
{
    return PyLong_FromUnsignedLong(transport_resent());
}

static PyObject *is_active(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(transport_is_active());
}

static PyObject *has_passthrough(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(state.passthrough);
}

static PyObject *hold(PyObject *self, PyObject *held)
{
    lock();
    state.held = held == Py_True;
    unlock();
    Py_RETURN_NONE;
}

static PyObject *serve(PyObject *self, PyObject *args)
{
    unsigned long long number, numbering;
    PyObject *tuple;
    int bottom, fds[DIRECTORY_LAYERS];
    if (!PyArg_ParseTuple(args, "KO!pK:serve", &number, &PyTuple_Type, &tuple, &bottom, &numbering))
        return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    if (count < 1 || count > DIRECTORY_LAYERS)
        Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < count; i++) {
        fds[i] = PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
        if (PyErr_Occurred())
            return NULL;
    }
    lock();
    struct node *node = node_find(number);
    bool served = node && node->python && image_serve(node, fds, count, bottom, numbering);
    unlock();
    return PyBool_FromLong(served);
}

static PyObject *withdraw(PyObject *self, PyObject *argument)
{
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node) {
        image_withdraw(node);
        contents_retire(node);
    }
    unlock();
    Py_RETURN_NONE;
}

static PyObject *claim(PyObject *self, PyObject *argument)
{
    unsigned long long lookups = 0;
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node && !node->python) {
        lookups = node->lookups;
        node_give_to_python(node);
    }
    unlock();
    return PyLong_FromUnsignedLongLong(lookups);
}

static PyObject *forget(PyObject *self, PyObject *args)
{
    unsigned long long number, lookups;
    if (!PyArg_ParseTuple(args, "KK:forget", &number, &lookups))
        return NULL;
    lock();
    struct node *node = node_find(number);
    if (node)
        node_forget(node, lookups);
    unlock();
    Py_RETURN_NONE;
}

static PyObject *place(PyObject *self, PyObject *argument)
{
    PyObject *result = NULL;
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node && !node->python && node->parent)
        result = Py_BuildValue("IKy", node->type, (unsigned long long)node->parent->number,
                               node->name);
    unlock();
    if (result || PyErr_Occurred())
        return result;
    Py_RETURN_NONE;
}

static PyObject *shows_image(PyObject *self, PyObject *argument)
{
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    bool shows = node && !node->python && !node->inherited;
    unlock();
    return PyBool_FromLong(shows);
}

static PyObject *listed(PyObject *self, PyObject *argument)
{
    uint64_t handle = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(image_listed(handle));
}

static PyObject *is_served(PyObject *self, PyObject *argument)
{
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    bool served = node && node->directory;
    unlock();
    return PyBool_FromLong(served);
}

static void append(struct node *node, void *numbers)
{
    PyObject *number = PyLong_FromUnsignedLongLong(node->number);
    if (number) {
        PyList_Append(numbers, number);
        Py_DECREF(number);
    }
}

/* Return a list that `visit` makes, node by node. */
static PyObject *collect_numbers(void (*visit)(struct node *, void *))
{
    PyObject *numbers = PyList_New(0);
    if (!numbers)
        return NULL;
    lock();
    node_each(visit, numbers);
    unlock();
    if (PyErr_Occurred())
        Py_CLEAR(numbers);
    return numbers;
}

static void append_name(uint64_t parent, const char *name, void *list)
{
    PyObject *item = Py_BuildValue("Ky", (unsigned long long)parent, name);
    if (item)
        PyList_Append(list, item);
    Py_XDECREF(item);
}

static void append_name_of(struct node *node, void *list)
{
    if (node->parent)
        append_name(node->parent->number, node->name, list);
}

static PyObject *names(PyObject *self, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    if (!list)
        return NULL;
    lock();
    node_each(append_name_of, list);
    missing_each(append_name, list);
    unlock();
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

static PyObject *remember_missing(PyObject *self, PyObject *args)
{
    unsigned long long parent;
    const char *name;
    if (!PyArg_ParseTuple(args, "Ky:remember_missing", &parent, &name))
        return NULL;
    lock();
    uint32_t seconds = missing_remember(parent, name);
    unlock();
    return PyLong_FromUnsignedLong(seconds);
}

static void append_opened(struct node *node, void *numbers)
{
    if (node->contents && (node->contents->opens || contents_mapped(node->contents)))
        append(node, numbers);
}

static PyObject *opened(PyObject *self, PyObject *unused)
{
    return collect_numbers(append_opened);
}

static void end_generation(struct node *node, void *directories)
{
    node->inherited = false; /* it is of layers that are gone now, like those of the image */
    image_withdraw(node);
    if (node->python) /* the image stays what it is */
        contents_retire(node);
    if (!node->python && S_ISDIR(node->type))
        append(node, directories);
}

static PyObject *begin_generation(PyObject *self, PyObject *unused)
{
    lock();
    state.generation++;
    unlock();
    return collect_numbers(end_generation);
}

static PyObject *set_contents(PyObject *self, PyObject *args)
{
    unsigned long long number;
    int fd, writable;
    if (!PyArg_ParseTuple(args, "Kip:set_contents", &number, &fd, &writable))
        return NULL;
    lock();
    struct node *node = node_get(number);
    bool set = node && contents_set(node, fd, writable);
    unlock();
    if (!node)
        return PyErr_NoMemory();
    return PyBool_FromLong(set);
}

static PyObject *opens(PyObject *self, PyObject *argument)
{
    uint32_t count = 0, writers = 0;
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node && node->contents) {
        count = node->contents->opens;
        /* What the kernel hands on to be written goes where it has to. */
        writers = (node->contents->backing ? node->contents->writers : 0) +
                  contents_mapped(node->contents);
    }
    unlock();
    return Py_BuildValue("II", count, writers);
}

static PyObject *set_kept(PyObject *argument, bool kept)
{
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node)
        contents_keep(node, kept);
    unlock();
    Py_RETURN_NONE;
}

static PyObject *keep(PyObject *self, PyObject *argument)
{
    return set_kept(argument, true);
}

static PyObject *give_up(PyObject *self, PyObject *argument)
{
    return set_kept(argument, false);
}

static PyObject *closes(PyObject *self, PyObject *argument)
{
    uint32_t count = 0;
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node && node->contents)
        count = node->contents->closes;
    unlock();
    return PyLong_FromUnsignedLong(count);
}

static PyObject *finish(PyObject *self, PyObject *args)
{
    unsigned long long number;
    unsigned int closes;
    if (!PyArg_ParseTuple(args, "KI:finish", &number, &closes))
        return NULL;
    lock();
    struct node *node = node_find(number);
    bool finished = !node || contents_finish(node, closes);
    unlock();
    return PyBool_FromLong(finished);
}

static PyObject *duplicate(PyObject *self, PyObject *argument)
{
    int fd = -1;
    struct node *node;
    if (!lock_and_find(argument, &node))
        return NULL;
    if (node && node->contents)
        fd = fcntl(node->contents->fd, F_DUPFD_CLOEXEC, 0);
    unlock();
    return PyLong_FromLong(fd);
}

static PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, NULL},
    {"record", record, METH_VARARGS, NULL},
    {"key", key, METH_NOARGS, NULL},
    {"placed", placed, METH_VARARGS, NULL},
    {"removed", removed, METH_VARARGS, NULL},
    {"note", note, METH_VARARGS, NULL},
    {"inherited", inherited, METH_NOARGS, NULL},
    {"inherited_listings", inherited_listings, METH_NOARGS, NULL},
    {"last_listing", last_listing, METH_NOARGS, NULL},
    {"reopen_listing", reopen_listing, METH_VARARGS, NULL},
    {"resent", resent, METH_NOARGS, NULL},
    {"is_active", is_active, METH_NOARGS, NULL},
    {"has_passthrough", has_passthrough, METH_NOARGS, NULL},
    {"hold", hold, METH_O, NULL},
    {"serve", serve, METH_VARARGS, NULL},
    {"withdraw", withdraw, METH_O, NULL},
    {"forget", forget, METH_VARARGS, NULL},
    {"claim", claim, METH_O, NULL},
    {"place", place, METH_O, NULL},
    {"shows_image", shows_image, METH_O, NULL},
    {"listed", listed, METH_O, NULL},
    {"is_served", is_served, METH_O, NULL},
    {"opened", opened, METH_NOARGS, NULL},
    {"names", names, METH_NOARGS, NULL},
    {"remember_missing", remember_missing, METH_VARARGS, NULL},
    {"begin_generation", begin_generation, METH_NOARGS, NULL},
    {"set_contents", set_contents, METH_VARARGS, NULL},
    {"opens", opens, METH_O, NULL},
    {"keep", keep, METH_O, NULL},
    {"give_up", give_up, METH_O, NULL},
    {"closes", closes, METH_O, NULL},
    {"finish", finish, METH_VARARGS, NULL},
    {"duplicate", duplicate, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernel_io", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__kernel_io(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "TRY_AGAIN", TRY_AGAIN) ||
                 PyModule_AddIntConstant(made, "NAMES_ONLY", NAMES_ONLY) ||
                 PyModule_AddIntConstant(made, "SETXATTR", FUSE_SETXATTR)))
        Py_CLEAR(made);
    return made;
}
