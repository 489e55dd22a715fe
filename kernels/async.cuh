// Copies to shared memory that go on while a block computes.
#pragma once

#include "common.cuh"

// Sixteen bytes, or zeros.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
    const u32 address = u32(__cvta_generic_to_shared(to)), bytes = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Makes a group of this thread's copies since the last group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups of this thread's copies are under way.
template <u32 N>
__device__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
