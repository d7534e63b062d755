/* The table of nodes that the kernel holds, and orders of use. */
#include "kernel_io.h"

#include <stdlib.h>
#include <string.h>

static struct node **chains;
static size_t chain_count, node_count;

static size_t chain_of(uint64_t number, size_t count)
{
    return (number * 0x9e3779b97f4a7c15ull >> 20) & (count - 1);
}

static bool grow(void)
{
    size_t count = chain_count ? chain_count * 2 : 256;
    struct node **larger = calloc(count, sizeof *larger);
    if (!larger)
        return false;
    for (size_t i = 0; i < chain_count; i++)
        for (struct node *node = chains[i], *next; node; node = next) {
            size_t chain = chain_of(node->number, count);
            next = node->next;
            node->next = larger[chain];
            larger[chain] = node;
        }
    free(chains);
    chains = larger;
    chain_count = count;
    return true;
}

struct node *node_find(uint64_t number)
{
    if (!chain_count)
        return NULL;
    struct node *node = chains[chain_of(number, chain_count)];
    while (node && node->number != number)
        node = node->next;
    return node;
}

struct node *node_get(uint64_t number)
{
    struct node *node = node_find(number);
    if (node)
        return node;
    if (node_count >= chain_count && !grow())
        return NULL;
    node = calloc(1, sizeof *node);
    if (!node)
        return NULL;
    node->number = number;
    node->python = true;
    struct node **chain = &chains[chain_of(number, chain_count)];
    node->next = *chain;
    *chain = node;
    node_count++;
    return node;
}

bool node_place(struct node *node, struct node *parent, const char *name)
{
    char *copy = strdup(name);
    if (!copy)
        return false;
    node->name = copy;
    node->parent = parent;
    node->python = false;
    parent->children++;
    return true;
}

static void collect(struct node *node);

static void unplace(struct node *node)
{
    struct node *parent = node->parent;
    free(node->name);
    node->name = NULL;
    node->parent = NULL;
    if (parent) {
        parent->children--;
        collect(parent);
    }
}

/* Free a node that nobody needs any more, and then its parents that were kept for its sake. */
static void collect(struct node *node)
{
    if (node->lookups || node->children || (node->contents && (node->contents->opens || node->contents->kept)) ||
        node->number == ROOT_NUMBER)
        return;
    struct node **link = &chains[chain_of(node->number, chain_count)];
    while (*link != node)
        link = &(*link)->next;
    *link = node->next;
    node_count--;
    image_withdraw(node);
    contents_close(node);
    unplace(node);
    free(node);
}

void node_forget(struct node *node, uint64_t lookups)
{
    node->lookups -= lookups < node->lookups ? lookups : node->lookups;
    collect(node);
}

void node_give_to_python(struct node *node)
{
    if (node->python)
        return;
    if (node->generation != state.generation) /* in these layers it may be another file */
        contents_retire(node);
    node->python = true;
    unplace(node);
    image_withdraw(node);
}

void node_each(void (*visit)(struct node *, void *), void *argument)
{
    for (size_t i = 0; i < chain_count; i++)
        for (struct node *node = chains[i]; node; node = node->next)
            visit(node, argument);
}

void use_end(struct use *use)
{
    struct order *order = use->order;
    if (!order)
        return;
    *(use->newer ? &use->newer->older : &order->newest) = use->older;
    *(use->older ? &use->older->newer : &order->oldest) = use->newer;
    *use = (struct use){0};
    order->count--;
}

void use_now(struct order *order, struct use *use, struct node *node)
{
    use_end(use);
    use->node = node;
    use->order = order;
    use->older = order->newest;
    *(order->newest ? &order->newest->newer : &order->oldest) = use;
    order->newest = use;
    order->count++;
}
