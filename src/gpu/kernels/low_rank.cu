// W += scale * B A.      Judge: gpu::merged_low_rank; of the counts, backend::merge_sums
//   weights  (n_rows, d_in)  in place
//   b        (n_rows, rank)  f32
//   a        (rank, d_in)    f32
//   counts   (4)             added to: deltas that are not zero, those that changed nothing, changed weights, finite weights
//                            that are finite no more
// Each product is summed in f32 over the rank, ascending, with fused steps; then one product with the scale, one sum with the weight
// and one rounding to the weight's type. A weight that is a NaN keeps its bits.
#include "common.cuh"

#define TILE 64  // rows and columns of a block
#define DEPTH 16 // of the rank, staged at once

// A thread has 4 x 4 elements, 16 rows and 16 columns apart, so that neighbours read neighbours.
// Launch: 256 threads, a block for each 64 columns (x) and each 64 rows (y); shared memory: 2 * 16 * 64 floats.
template <class T>
__device__ __forceinline__ void low_rank(typename T::Bits* weights, const float* b, const float* a, float scale, u32 n_rows,
                                         u32 d_in, u32 rank, u64* counts) {
    SHARED_BYTES(shared);
    float* b_tile = (float*)shared;         // (DEPTH, TILE): the rank first
    float* a_tile = b_tile + DEPTH * TILE;  // (DEPTH, TILE)
    u32 thread = threadIdx.x, x = thread % 16, y = thread / 16;
    u64 first_row = (u64)blockIdx.y * TILE, first_column = (u64)blockIdx.x * TILE;
    float sums[4][4] = {};
    for (u32 from = 0; from < rank; from += DEPTH) {
        for (u32 i = thread; i < DEPTH * TILE; i += 256) {
            u64 row = first_row + i / DEPTH, column = first_column + i % TILE;
            u32 b_rank = from + i % DEPTH, a_rank = from + i / TILE;
            // Zeros beyond the edges add nothing.
            b_tile[i % DEPTH * TILE + i / DEPTH] = row < n_rows && b_rank < rank ? b[row * rank + b_rank] : 0.0f;
            a_tile[i] = column < d_in && a_rank < rank ? a[(u64)a_rank * d_in + column] : 0.0f;
        }
        __syncthreads();
        u32 depth = rank - from < DEPTH ? rank - from : DEPTH;
        for (u32 r = 0; r < depth; r++) {
            float of_b[4], of_a[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) of_b[i] = b_tile[r * TILE + y + 16 * i], of_a[i] = a_tile[r * TILE + x + 16 * i];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) sums[i][j] = fmaf(of_b[i], of_a[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
    // Two counts in a word: of a block's 4096 elements each fits 16 bits.
    u32 deltas = 0, changes = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u64 row = first_row + y + 16 * i, column = first_column + x + 16 * j;
            if (row >= n_rows || column >= d_in) continue;
            typename T::Bits* at = weights + row * d_in + column;
            float delta = __fmul_rn(sums[i][j], scale);
            u32 is_nonzero = delta != 0.0f, old = *at;
            deltas += is_nonzero;
            if ((old & T::MASK) > T::INF) continue;
            u32 value = T::round(__fadd_rn(T::widen(old), delta));
            *at = value;
            deltas += (is_nonzero & (value == old)) << 16;
            changes += (value != old) + ((u32)((old & T::MASK) < T::INF && (value & T::MASK) >= T::INF) << 16);
        }
    }
    for (u32 distance = 16; distance > 0; distance /= 2) {
        deltas += __shfl_xor_sync(ALL_LANES, deltas, distance);
        changes += __shfl_xor_sync(ALL_LANES, changes, distance);
    }
    // The tiles were read for the last time before the last barrier.
    u32* of_warps = (u32*)shared;
    if (thread % 32 == 0) of_warps[thread / 32] = deltas, of_warps[8 + thread / 32] = changes;
    __syncthreads();
    if (thread >= 4) return;
    u32 sum = 0;
    for (u32 warp = 0; warp < 8; warp++) sum += of_warps[thread / 2 * 8 + warp] >> thread % 2 * 16 & 0xffff;
    if (sum > 0) atomicAdd(counts + thread, (u64)sum);
}

#define LOW_RANK(T, NAME)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) low_rank_##NAME(T::Bits* weights, const float* b, const float* a,    \
                                                                      float scale, u32 n_rows, u32 d_in, u32 rank,         \
                                                                      u64* counts) {                                       \
        low_rank<T>(weights, b, a, scale, n_rows, d_in, rank, counts);                                                     \
    }

LOW_RANK(Bf16, bf16)
LOW_RANK(F16, f16)
LOW_RANK(F32, f32)
