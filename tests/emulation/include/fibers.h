// An emulation of a GPU: the threads of a block are fibers, which give way to each other where they
// wait. Blocks run one after another. Which fiber goes on is drawn, so that what wants a barrier and
// has none shows: in some blocks at each turn, in others one warp after another runs as far as it
// can. The same seed draws the same.
#pragma once
#include "types.h"

extern "C" void emulated_switch(void** left, void* entered);
// The registers that a call keeps go on the stack that is left, and come from the one entered.
asm(R"(
    .text
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulated_switch, . - emulated_switch
)");

// Shared memory is one section of this library; the linker knows where it begins and ends.
extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}

// Macros give these their CUDA names later: system headers know some of them otherwise.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulation {

const int MAX_THREADS = 1024, WARP = 32, MEETINGS = 8, VALUE_BYTES = 32;
const size_t STACK_BYTES = 64 << 10, MAX_SHARED = 227 << 10;

// Some lanes of a warp exchanging values: each brings one, and reads those of the others.
struct Meeting {
    unsigned mask, arrived, left;
    const char* what;
    __attribute__((aligned(16))) unsigned char values[WARP][VALUE_BYTES];
};

struct Fiber {
    void* stack;
    uint3 index;
    const char* waits;  // for what, or null
    int line;           // where it waits for the block
};

static Fiber fibers[MAX_THREADS];
static struct Warp {
    unsigned alive;
    Meeting meetings[MEETINGS];
} warps[MAX_THREADS / WARP];
static int ready[MAX_THREADS], ready_count, alive, current;
static struct {
    int waiting, line;
    unsigned phase, counts[2];
} barrier_state;
static void* host_stack;
static const char* failure;
static char failure_text[512];
static uint64_t random_state;
static bool depth_first, descending;  // how the present block's fibers take turns
static void (*body)(void**);
static void** body_arguments;
__attribute__((aligned(1024))) static char dynamic_shared[MAX_SHARED];

inline unsigned draw(unsigned count) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((random_state >> 33) * count >> 31);
}

// Ends the launch from within a fiber.
__attribute__((noinline)) static void fail(const char* text) {
    const Fiber& fiber = fibers[current];
    snprintf(failure_text, sizeof failure_text, "%s: block (%u, %u, %u), thread %u", text,
             blockIdx.x, blockIdx.y, blockIdx.z, fiber.index.x);
    failure = failure_text;
    void* never;
    emulated_switch(&never, host_stack);
}

__attribute__((noinline)) static void fail_stuck() {
    // The first fiber that waits for each thing stands for the others.
    size_t used = snprintf(failure_text, sizeof failure_text,
                           "no thread of block (%u, %u, %u) can go on:", blockIdx.x, blockIdx.y,
                           blockIdx.z);
    for (unsigned i = 0; i < blockDim.x && used < sizeof failure_text; i++) {
        if (!fibers[i].waits) continue;
        int alike = 0;
        bool first = true;
        for (unsigned j = 0; j < blockDim.x; j++) {
            const bool same = fibers[j].waits == fibers[i].waits && fibers[j].line == fibers[i].line;
            alike += same;
            if (same && j < i) first = false;
        }
        if (first)
            used += snprintf(failure_text + used, sizeof failure_text - used,
                             " %d from thread %u on in %s (line %d)", alike, i, fibers[i].waits,
                             fibers[i].line);
    }
    failure = failure_text;
    void* never;
    emulated_switch(&never, host_stack);
}

// Lets another fiber go on; returns when this one is drawn again.
__attribute__((noinline)) static void give_way(bool to_any = false) {
    if (ready_count == 0) fail_stuck();
    const int at = depth_first && !to_any ? ready_count - 1 : draw(ready_count);
    const int next = ready[at];
    ready[at] = ready[--ready_count];
    const int self = current;
    if (next == self) return;
    current = next;
    threadIdx = fibers[next].index;
    emulated_switch(&fibers[self].stack, fibers[next].stack);
}

inline void wake(int fiber) {
    fibers[fiber].waits = nullptr;
    fibers[fiber].line = 0;
    ready[ready_count++] = fiber;
}

// A fiber that looks again and again for what others do.
inline void poll() {
    ready[ready_count++] = current;
    give_way(true);
}

inline void release_barrier_if_all_wait() {
    if (alive == 0 || barrier_state.waiting < alive) return;
    barrier_state.waiting = 0;
    barrier_state.phase++;
    barrier_state.counts[barrier_state.phase % 2] = 0;
    for (unsigned i = 0; i < blockDim.x; i++) {
        const int fiber = descending ? blockDim.x - 1 - i : i;
        if (fibers[fiber].waits && fibers[fiber].line) wake(fiber);
    }
}

// __syncthreads: how many threads gave a `vote` that is not zero.
__attribute__((noinline)) static int meet_block(int line, bool vote) {
    if (barrier_state.waiting && barrier_state.line != line)
        fail("threads wait at different __syncthreads");
    const unsigned phase = barrier_state.phase;
    barrier_state.line = line;
    barrier_state.waiting++;
    barrier_state.counts[phase % 2] += vote;
    fibers[current].waits = "__syncthreads", fibers[current].line = line;
    release_barrier_if_all_wait();
    give_way();
    return barrier_state.counts[phase % 2];
}

inline void complete_if_all_came(int warp, Meeting& meeting) {
    const unsigned wanted = meeting.mask & warps[warp].alive;
    if (!meeting.arrived || (meeting.arrived & wanted) != wanted) return;
    for (int i = 0; i < WARP; i++) {
        const int lane = descending ? WARP - 1 - i : i;
        if (meeting.arrived >> lane & 1) wake(warp * WARP + lane);
    }
    meeting.what = nullptr;  // closed: who comes later opens another
}

// The meeting of the lanes in `mask`, once all of them have brought their value.
__attribute__((noinline)) static Meeting& meet_warp(unsigned mask, const char* what,
                                                     const void* value, size_t bytes) {
    const int index = current / WARP, lane = current % WARP;
    Warp& warp = warps[index];
    if (!(mask >> lane & 1)) fail("a lane that is not in its own mask");
    Meeting* found = nullptr;
    for (Meeting& meeting : warp.meetings)
        if (meeting.what && meeting.mask == mask) found = &meeting;
    if (!found) {
        for (Meeting& meeting : warp.meetings)
            if (!meeting.what && meeting.arrived == meeting.left) found = &meeting;
        if (!found) fail("a warp meets in too many masks at once");
        found->mask = mask, found->arrived = found->left = 0, found->what = what;
        memset(found->values, 0xff, sizeof found->values);
    }
    if (strcmp(found->what, what)) fail("lanes of a warp meet in different functions");
    memcpy(found->values[lane], value, bytes);
    found->arrived |= 1u << lane;
    fibers[current].waits = what;
    complete_if_all_came(index, *found);
    give_way();
    return *found;
}
inline void leave(Meeting& meeting) { meeting.left |= 1u << current % WARP; }

// Memory that kernels before this one may still write while this one begins. It is hidden from the
// first block until that has waited for them: what is read before is NaN, what is written is lost.
struct Range {
    char* address;
    size_t bytes;
};
static const Range* ranges;
static size_t range_count;
static char* hidden_copy;
static bool hidden;
static int waiting_for_previous;

static void hide() {
    hidden = range_count > 0;
    waiting_for_previous = 0;
    char* copy = hidden_copy;
    for (size_t i = 0; i < range_count; copy += ranges[i++].bytes) {
        memcpy(copy, ranges[i].address, ranges[i].bytes);
        memset(ranges[i].address, 0xff, ranges[i].bytes);
    }
}
static void show() {
    if (!hidden) return;
    hidden = false;
    const char* copy = hidden_copy;
    for (size_t i = 0; i < range_count; copy += ranges[i++].bytes)
        memcpy(ranges[i].address, copy, ranges[i].bytes);
    for (unsigned i = 0; i < blockDim.x; i++)
        if (fibers[i].waits && !strcmp(fibers[i].waits, "wait_for_previous")) wake(i);
}
__attribute__((noinline)) static void wait_for_previous() {
    if (!hidden) return;
    fibers[current].waits = "wait_for_previous";
    if (++waiting_for_previous == alive) show();
    give_way();
}

static void reset_copies();

static void run_fiber() {
    body(body_arguments);
    const int warp = current / WARP;
    alive--;
    warps[warp].alive &= ~(1u << current % WARP);
    for (Meeting& meeting : warps[warp].meetings)
        if (meeting.what) complete_if_all_came(warp, meeting);
    release_barrier_if_all_wait();
    if (hidden && waiting_for_previous == alive) show();
    void* never;
    if (alive == 0) emulated_switch(&never, host_stack);
    give_way();
}

inline void* fresh_stack(char* top) {
    void** words = (void**)top;
    words[-1] = nullptr;
    words[-2] = (void*)run_fiber;
    for (int i = 3; i <= 8; i++) words[-i] = nullptr;
    return words - 8;
}

static void run_block(char* stacks, size_t shared_bytes) {
    // What nobody has written is NaN.
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    memset(dynamic_shared, 0xff, shared_bytes);
    reset_copies();
    depth_first = draw(2), descending = draw(2);
    memset(&barrier_state, 0, sizeof barrier_state);
    alive = blockDim.x, ready_count = 0;
    for (int i = 0; i < alive; i++) {
        fibers[i].stack = fresh_stack(stacks + (i + 1) * STACK_BYTES);
        fibers[i].index = {(unsigned)i, 0, 0};
        wake(i);
    }
    for (int w = 0; w * WARP < alive; w++) {
        warps[w].alive = alive - w * WARP >= WARP ? ~0u : (1u << (alive - w * WARP)) - 1;
        for (Meeting& meeting : warps[w].meetings)
            meeting.arrived = meeting.left = 0, meeting.what = nullptr;
    }
    const int at = draw(ready_count);
    current = ready[at];
    ready[at] = ready[--ready_count];
    threadIdx = fibers[current].index;
    emulated_switch(&host_stack, fibers[current].stack);
}

// Runs a kernel's grid, its blocks from the last on where bit 32 of the seed is set. What went wrong
// is `failure` then, else null.
static void run_grid(void (*kernel)(void**), void** arguments, const unsigned* grid,
                     unsigned threads, size_t shared_bytes, char* stacks, uint64_t seed) {
    failure = nullptr;
    if (threads == 0 || threads > MAX_THREADS) failure = "a block has 1 to 1024 threads";
    if (shared_bytes > MAX_SHARED) failure = "a block has at most 227 KB of shared memory";
    if (failure) return;
    body = kernel, body_arguments = arguments, random_state = seed;
    blockDim = {threads, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
    draw(1), draw(1);
    const bool backwards = seed >> 32 & 1;
    const size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
    for (size_t i = 0; i < blocks && !failure; i++) {
        const size_t block = backwards ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(block % grid[0]), (unsigned)(block / grid[0] % grid[1]),
                    (unsigned)(block / grid[0] / grid[1])};
        if (i == 0) hide();
        run_block(stacks, shared_bytes);
        show();
    }
}

template <class... A, size_t... I>
inline void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(typename std::remove_const<A>::type*)arguments[I]...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::make_index_sequence<sizeof...(A)>());
}

}  // namespace emulation
