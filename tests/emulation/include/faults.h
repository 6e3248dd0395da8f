// An emulation of a GPU: an address that is no memory ends the launch, not the process.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include "fibers.h"

namespace emulation {

static sigjmp_buf outside;
static pthread_t launching;
static volatile bool in_launch;
static struct sigaction earlier[2];
static const int SIGNALS[2] = {SIGSEGV, SIGBUS};
static char signal_stack[32 << 10];

static void on_fault(int number, siginfo_t* info, void* context) {
    if (!in_launch || !pthread_equal(launching, pthread_self())) {
        // Another thread's: what was there before shall see to it.
        sigaction(number, &earlier[number == SIGBUS], nullptr);
        return;
    }
    snprintf(failure_text, sizeof failure_text,
             "touches no memory at %p: block (%u, %u, %u), thread %u", info->si_addr, blockIdx.x,
             blockIdx.y, blockIdx.z, fibers[current].index.x);
    failure = failure_text;
    siglongjmp(outside, 1);
}

// `run` with faults turned into failures.
template <class Run>
inline const char* guarded(Run run) {
    stack_t own = {signal_stack, 0, sizeof signal_stack}, other;
    sigaltstack(&own, &other);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &action, &earlier[i]);
    launching = pthread_self();
    if (sigsetjmp(outside, 1) == 0) {
        in_launch = true;
        run();
    }
    in_launch = false;
    show();
    for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &earlier[i], nullptr);
    sigaltstack(&other, nullptr);
    return failure;
}

}  // namespace emulation
