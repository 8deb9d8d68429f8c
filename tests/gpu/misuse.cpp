// Kernels that are wrong in the ways that hang or corrupt on a GPU: the shim must notice each.
#include "shim.h"

#include <string>

static void barrier_after_return() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}
static void barrier_in_branch() {
    if (threadIdx.x < 40) __syncthreads();
    else __syncwarp(); // one half of the second warp waits for the other
}
static void shuffle_in_branch() {
    if (threadIdx.x < 7) __shfl_sync(~0u, 1u, 0u);
    else __syncthreads();
}
static void ballot_against_shuffle() {
    if (threadIdx.x % 2) __ballot_sync(~0u, true);
    else __shfl_xor_sync(~0u, 1u, 1u);
}
static void shuffle_after_return() {
    if (threadIdx.x == 9) return;
    __shfl_xor_sync(~0u, 1u, 1u);
}

int main(int, char** arguments) {
    std::string which = arguments[1];
    auto kernel = which == "barrier_after_return"     ? barrier_after_return
                  : which == "barrier_in_branch"      ? barrier_in_branch
                  : which == "shuffle_in_branch"      ? shuffle_in_branch
                  : which == "ballot_against_shuffle" ? ballot_against_shuffle
                                                      : shuffle_after_return;
    sim::launch(arguments[1], Dim{1, 1, 1}, 64, 16, kernel);
}
