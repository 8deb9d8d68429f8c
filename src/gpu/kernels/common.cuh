// What all kernels share: integers by width, and floats as bits with the project's own rounding.
//
// No NVIDIA header is included, so that the compiler alone is needed, and so that tests/gpu/shim.h can stand in for it: every
// kernel is also compiled as C++ and judged on the CPU. Conversions are plain integer code for that reason: what is judged there is
// what runs here. Kernels are compiled without contraction: a product and a sum round twice unless `fmaf` is written.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Shared memory of the size given at the launch.
#ifndef SHARED_BYTES
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define ALL_LANES 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000)

// Each float type: its bits, the bits of its magnitude, the largest magnitude of a number, exact widening, and rounding to
// nearest even, where every NaN becomes the one quiet NaN with a clear sign.
struct Bf16 {
    typedef u16 Bits;
    static const u32 MASK = 0x7fff;
    static const u32 INF = 0x7f80;
    static __device__ __forceinline__ float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static __device__ __forceinline__ u16 round(float x) {
        u32 bits = __float_as_uint(x);
        if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
        return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct F16 {
    typedef u16 Bits;
    static const u32 MASK = 0x7fff;
    static const u32 INF = 0x7c00;
    static __device__ __forceinline__ float widen(u16 bits) {
        u32 sign = (u32)(bits & 0x8000) << 16;
        u32 magnitude = bits & 0x7fff;
        // Infinity and NaN keep their payload; for all else the product with 2^112 moves the exponent, exactly.
        u32 wide = magnitude >= INF ? 0x7f800000 | (magnitude & 0x3ff) << 13
                                    : __float_as_uint(__uint_as_float(magnitude << 13) * 5.192296858534828e33f);
        return __uint_as_float(sign | wide);
    }
    static __device__ __forceinline__ u16 round(float x) {
        u32 bits = __float_as_uint(x);
        u32 sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) return 0x7e00;
        if (bits >= 0x477ff000) return (u16)(sign | INF); // 65520 and above
        if (bits < 0x38800000) {                          // below 2^-14: the sum has the spacing of subnormals, 2^-24
            return (u16)(sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000));
        }
        return (u16)(sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
    }
};

struct F32 {
    typedef u32 Bits;
    static const u32 MASK = 0x7fffffff;
    static const u32 INF = 0x7f800000;
    static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ u32 round(float x) {
        u32 bits = __float_as_uint(x);
        return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits;
    }
};

template <class T> __device__ __forceinline__ bool is_nan(typename T::Bits bits) { return (bits & T::MASK) > T::INF; }

// Leaves the first place of a NaN: the smallest row, and of that the smallest column.
__device__ __forceinline__ void report_nan(u64* first_nan, u64 row, u32 column) {
    atomicMin(first_nan, row << 32 | column);
}
