// A tensor from one rank to another: `send` writes it into the receiver's mailbox, `receive` waits
// for it there. FEATURES: elements of a token. WIDTH: elements a load. THREADS: block size. Grid: at
// most MAX_BLOCKS, the same for both.
// `mailboxes`: those of this rank, of the rank that it sends to, and of the one that it hears from.
#include "common.cuh"
#include "exchange.cuh"

typedef Pack<WIDTH> P;

// True on the last of the grid's blocks to come here. What all of them did before has been done.
DEVICE bool is_last(u32* count) {
    __threadfence();
    if (atomicAdd(count, 1) != gridDim.x - 1) return false;
    __threadfence();
    *count = 0;
    return true;
}

extern "C" __global__ void __launch_bounds__(THREADS)
send(const T* x, const u64* mailboxes, int tokens, int slot_units) {
    let_next_start();
    Mailbox* own = (Mailbox*)mailboxes[0];
    Mailbox* there = (Mailbox*)mailboxes[1];
    wait_for_previous();
    const u32 message = *(volatile u32*)&own->sent;
    // The slot is free once the message before last has been read.
    if (threadIdx.x == 0) wait_for(&own->taken, message - 1);
    __syncthreads();
    P* slot = (P*)slot_of(mailboxes[1], message, slot_units);
    const int total = tokens * (FEATURES / WIDTH);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < total; i += gridDim.x * THREADS)
        slot[i] = ((const P*)x)[i];
    __syncthreads();
    if (threadIdx.x) return;
    store_release(&there->arrived[blockIdx.x], message + 1);
    if (is_last(&own->sending)) own->sent = message + 1;
}

extern "C" __global__ void __launch_bounds__(THREADS)
receive(T* out, const u64* mailboxes, int tokens, int slot_units) {
    let_next_start();
    Mailbox* own = (Mailbox*)mailboxes[0];
    Mailbox* there = (Mailbox*)mailboxes[2];
    wait_for_previous();
    const u32 message = *(volatile u32*)&own->received;
    if (threadIdx.x == 0) wait_for(&own->arrived[blockIdx.x], message + 1);
    __syncthreads();
    const P* slot = (const P*)slot_of(mailboxes[0], message, slot_units);
    const int total = tokens * (FEATURES / WIDTH);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < total; i += gridDim.x * THREADS)
        ((P*)out)[i] = load_arrived(slot + i);
    __syncthreads();
    if (threadIdx.x) return;
    if (is_last(&own->receiving)) {
        own->received = message + 1;
        store_release(&there->taken, message + 1);
    }
}
