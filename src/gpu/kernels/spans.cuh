// Examples end to end: where tokens, and blocks of them, belong. Whatever `starts` holds, a span lies inside of the n tokens.
#pragma once
#include "common.cuh"

struct Span {
    u32 example, start, end;
};

__device__ __forceinline__ Span span_at(const u32* starts, u32 example, u32 n) {
    Span span = {example, starts[example], starts[example + 1]};
    if (span.end > n) span.end = n;
    if (span.start > span.end) span.start = span.end;
    return span;
}

// The example that a token belongs to: the last that begins at or before it.
__device__ __forceinline__ Span span_of(const u32* starts, u32 n_examples, u32 n, u32 token) {
    u32 low = 0, high = n_examples;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (starts[middle] <= token) low = middle;
        else high = middle;
    }
    return span_at(starts, low, n);
}

// Runs of `size` tokens of each example, the last of each shorter: the example that run `slot` belongs to, and `first`, the run's first
// token in it, which may lie beyond its end. Example i has the slots from starts[i] / size + i on, at least as many as it has runs:
// floor(b / size) - floor(a / size) + 1 >= ceil((b - a) / size). Slots in all: n / size + n_examples.
__device__ __forceinline__ Span run_of(const u32* starts, u32 n_examples, u32 n, u32 slot, u32 size, u32& first) {
    u32 low = 0, high = n_examples;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (starts[middle] / size + middle <= slot) low = middle;
        else high = middle;
    }
    u32 before = starts[low] / size + low;
    first = slot < before ? n : (slot - before) * size;
    return span_at(starts, low, n);
}

// The keys of an example, from the first on: in the rows of its tokens, or in the cache, where some were `before` its tokens.
template <class T> struct KeyRows {
    const typename T::Bits* k; // values lie d_kv further
    u32 stride;                // from one key to the next
    u32 before;
};

template <class T>
__device__ __forceinline__ KeyRows<T> key_rows(const typename T::Bits* qkv, Span span, u32 width, u32 d_kv, const u32* past,
                                               const typename T::Bits* cache, u32 capacity) {
    if (!past) return {qkv + (u64)span.start * width + (width - 2 * d_kv), width, 0};
    u32 before = past[span.example];
    if (before > capacity) before = capacity;
    return {cache + (u64)span.example * capacity * 2 * d_kv, 2 * d_kv, before};
}
