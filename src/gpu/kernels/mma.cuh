// Products of small tiles on tensor cores, and the moves that feed them: one PTX instruction each, with a twin in tests/gpu/shim.h that
// is made from the tables of the PTX manual. Tiles lie in shared memory as 16-bit elements; 8 x 8 of them are one matrix of `ldmatrix`.
//
// Lane L of a warp, with g = L / 4 and t = L % 4, holds of a product C (16 x 8) += A (16 x 16) B (16 x 8):
//   a[0] A[g, 2t..], a[1] A[g + 8, 2t..], a[2] A[g, 2t + 8..], a[3] A[g + 8, 2t + 8..]   two neighbours each
//   b[0] B[2t.., g], b[1] B[2t + 8.., g]                                                  two neighbours of a column each
//   c[0], c[1] C[g, 2t..], c[2], c[3] C[g + 8, 2t..]
#pragma once
#include "common.cuh"

#ifdef __CUDA_ARCH__

// A place in shared memory by its own address of 32 bits: offsets known beforehand become part of the instruction.
struct SharedAt {
    u32 address;
    __device__ __forceinline__ SharedAt(const u16* at) {
        asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(at));
    }
    __device__ __forceinline__ SharedAt operator+(u32 n_elements) const {
        SharedAt moved = *this;
        moved.address += 2 * n_elements;
        return moved;
    }
};

// c += a b, sums in f32.
template <class T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<Bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<F16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices; lane L gives the address of row L % 8 of matrix L / 8, and gets of matrix i two elements in r[i]: [g, 2t..], or, of the
// matrix turned round, [2t.., g].
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], SharedAt row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_turned(u32 (&r)[4], SharedAt row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}

// Starts to copy 16 bytes to shared memory, or zeros, where `is_there` is false: nothing is read then, wherever `from` points.
__device__ __forceinline__ void copy_16(SharedAt to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_4(SharedAt to, const void* from, bool is_there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to.address), "l"(from), "r"(is_there ? 4 : 0) : "memory");
}
// Waits for all copies that this thread started; a barrier shows them to the others.
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x, off by 2^-22 of it at most; what is below 2^-126 is zero.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two neighbours, rounded to nearest even.
template <class T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<Bf16>(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> __device__ __forceinline__ u32 pack<F16>(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

#else // the shim's

typedef const u16* SharedAt;
template <class T> void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { sim::mma<T>(c, a, b0, b1); }
inline void ldmatrix(u32 (&r)[4], SharedAt row) { sim::ldmatrix(r, row, false); }
inline void ldmatrix_turned(u32 (&r)[4], SharedAt row) { sim::ldmatrix(r, row, true); }
inline void copy_16(SharedAt to, const void* from, bool is_there) { sim::copy_later((void*)to, from, 16, is_there); }
inline void copy_4(SharedAt to, const void* from, bool is_there) { sim::copy_later((void*)to, from, 4, is_there); }
inline void copies_done() { sim::copies_done(); }
inline float power_of_2(float x) { return exp2f(x); }
template <class T> u32 pack(float low, float high) { return T::round(low) | (u32)T::round(high) << 16; }

#endif
