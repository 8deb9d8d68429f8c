// A libcublasLt.so that multiplies on the CPU, as work of the fake driver's streams.
//
// Stricter than the library: descriptions are looked up before they are used, an algorithm fits the product it was proposed for
// and no other, reductions whose order or precision is not fixed must have been refused, pointers are as aligned as was said.
// Sums run in float32, columns ascending; one algorithm splits them in two through the workspace.
//
// Environment:
//   FAKE_CUBLAS_REFUSE=CODE   products are refused with this status
//   FAKE_CUBLAS_START=CODE    handles are refused with this status
#include "shim.h"

#include "../../src/gpu/kernels/common.cuh"

#include <dlfcn.h>

#include <mutex>
#include <set>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68 };

struct Handle {};
struct Desc {
    int transposes_a = 0, transposes_b = 0;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7;
    uint32_t alignments[4] = {256, 256, 256, 256};
};
// What the 64 bytes of an algorithm hold.
struct Algorithm {
    uint64_t mark, product, splits, workspace;
    uint32_t alignments[4];
    uint64_t nothing[2];
};
static_assert(sizeof(Algorithm) == 64);
struct Proposal {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Proposal) == 96);

std::mutex lock;
std::set<void*> handles, descs, layouts, preferences;

#define BEGIN std::lock_guard<std::mutex> guard(lock)

template <class T> int made(std::set<void*>& all, void** at, T* it) {
    all.insert(it);
    *at = it;
    return OK;
}

template <class T> int gone(std::set<void*>& all, void* at) {
    if (!all.erase(at)) return INVALID_VALUE;
    delete (T*)at;
    return OK;
}

int refused(const char* why) {
    fprintf(stderr, "fake cublasLt: %s\n", why);
    return INVALID_VALUE;
}

// The fake driver's functions for libraries beside it.
template <class F> F driver(const char* name) {
    static void* handle = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* at = handle ? dlsym(handle, name) : nullptr;
    if (!at) {
        fprintf(stderr, "fake cublasLt: the fake driver is not there\n");
        abort();
    }
    return (F)at;
}
bool lies_on_device(const void* at, size_t n) { return driver<bool (*)(uint64_t, size_t)>("fake_lies_on_device")((uint64_t)at, n); }

size_t bytes_of(int type) { return type == R_32F ? 4 : 2; }

uint64_t mix(uint64_t seed, uint64_t value) { return (seed ^ value) * 0x9e3779b97f4a7c15u + (seed >> 29); }

uint64_t product_of(const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
    uint64_t mixed = desc.transposes_a + 2 * desc.transposes_b;
    for (const Layout* layout : {&a, &b, &d})
        for (uint64_t value : {(uint64_t)layout->type, layout->rows, layout->columns, (uint64_t)layout->stride}) mixed = mix(mixed, value);
    return mixed;
}

// Whether a product of these is defined.
const char* problem_of(const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
    uint64_t m = desc.transposes_a ? a.columns : a.rows, k = desc.transposes_a ? a.rows : a.columns;
    if (a.type != b.type) return "inputs of two types";
    if (d.type != a.type && d.type != R_32F) return "an output of a third type";
    uint64_t of_b = desc.transposes_b ? b.columns : b.rows, n = desc.transposes_b ? b.rows : b.columns;
    if (of_b != k || d.rows != m || d.columns != n) return "shapes that do not go together";
    for (const Layout* layout : {&a, &b, &d})
        if (!layout->rows || !layout->columns || layout->stride < (int64_t)layout->rows) return "a layout with gaps that are none";
    return nullptr;
}

float element(int type, const void* all, size_t at) {
    switch (type) {
    case R_16F: return F16::widen(((const u16*)all)[at]);
    case R_16BF: return Bf16::widen(((const u16*)all)[at]);
    default: return ((const float*)all)[at];
    }
}

struct Work {
    Desc desc;
    Layout a, b, d;
    const void *at_a, *at_b;
    void *at_d, *workspace;
    float alpha, beta;
    uint64_t splits;
};

int multiply(void* data) {
    Work* it = (Work*)data;
    const Layout &a = it->a, &b = it->b, &d = it->d;
    bool turns_b = it->desc.transposes_b;
    uint64_t k = turns_b ? b.columns : b.rows;
    for (uint64_t column = 0; column < d.columns; column++)
        for (uint64_t row = 0; row < d.rows; row++) {
            float sum = 0;
            for (uint64_t split = 0; split < it->splits; split++) {
                float part = 0;
                for (uint64_t i = k * split / it->splits; i < k * (split + 1) / it->splits; i++) {
                    size_t in_a = it->desc.transposes_a ? row * a.stride + i : i * a.stride + row;
                    size_t in_b = turns_b ? i * b.stride + column : column * b.stride + i;
                    part = fmaf(element(a.type, it->at_a, in_a), element(b.type, it->at_b, in_b), part);
                }
                // As a split sum does: through the workspace.
                float* stored = (float*)it->workspace + split;
                if (it->splits > 1) *stored = part;
                sum += it->splits > 1 ? *stored : part;
            }
            size_t at = column * d.stride + row;
            // Without beta the output is not read: it may hold anything.
            float value = it->alpha * sum;
            if (it->beta != 0) value += it->beta * element(d.type, it->at_d, at);
            switch (d.type) {
            case R_16F: ((u16*)it->at_d)[at] = F16::round(value); break;
            case R_16BF: ((u16*)it->at_d)[at] = Bf16::round(value); break;
            default: ((float*)it->at_d)[at] = value;
            }
        }
    delete it;
    return 0;
}

const uint64_t MARK = 0x6661b6a5;

} // namespace

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() { return 120804; }

API cublasLtCreate(void** handle) {
    BEGIN;
    if (const char* code = getenv("FAKE_CUBLAS_START")) return atoi(code);
    return made(handles, handle, new Handle);
}
API cublasLtDestroy(void* handle) {
    BEGIN;
    return gone<Handle>(handles, handle);
}
API cublasLtMatmulDescCreate(void** at, int compute, int scale) {
    BEGIN;
    if (compute != COMPUTE_32F || scale != R_32F) return refused("sums in another type than float32");
    return made(descs, at, new Desc);
}
API cublasLtMatmulDescSetAttribute(void* at, int attribute, const void* value, size_t n) {
    BEGIN;
    if (!descs.count(at) || (attribute != 3 && attribute != 4) || n != 4) return refused("an attribute of a product that is not known");
    (attribute == 3 ? ((Desc*)at)->transposes_a : ((Desc*)at)->transposes_b) = *(const int*)value;
    return OK;
}
API cublasLtMatmulDescDestroy(void* at) {
    BEGIN;
    return gone<Desc>(descs, at);
}
API cublasLtMatrixLayoutCreate(void** at, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    BEGIN;
    if (type != R_32F && type != R_16F && type != R_16BF) return refused("a type that is not known");
    return made(layouts, at, new Layout{type, rows, columns, stride});
}
API cublasLtMatrixLayoutDestroy(void* at) {
    BEGIN;
    return gone<Layout>(layouts, at);
}
API cublasLtMatmulPreferenceCreate(void** at) {
    BEGIN;
    return made(preferences, at, new Preference);
}
API cublasLtMatmulPreferenceSetAttribute(void* at, int attribute, const void* value, size_t n) {
    BEGIN;
    if (!preferences.count(at)) return refused("a preference that is none");
    Preference* it = (Preference*)at;
    if (attribute == 1 && n == 8) it->workspace = *(const uint64_t*)value;
    else if (attribute == 3 && n == 4) it->reductions = *(const uint32_t*)value;
    else if (attribute >= 5 && attribute <= 8 && n == 4) it->alignments[attribute - 5] = *(const uint32_t*)value;
    else return refused("a preference that is not known");
    return OK;
}
API cublasLtMatmulPreferenceDestroy(void* at) {
    BEGIN;
    return gone<Preference>(preferences, at);
}

API cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int n_asked,
                                   Proposal* proposals, int* n_proposals) {
    BEGIN;
    if (!handles.count(handle) || !descs.count(desc) || !preferences.count(preference)) return refused("a handle that is none");
    for (void* layout : {a, b, c, d})
        if (!layouts.count(layout)) return refused("a layout that is none");
    const Desc& product = *(Desc*)desc;
    const Layout &of_a = *(Layout*)a, &of_b = *(Layout*)b, &of_d = *(Layout*)d;
    if (const char* problem = c == d ? problem_of(product, of_a, of_b, of_d) : "two layouts of the output") return refused(problem);
    const Preference& wants = *(Preference*)preference;
    if (wants.reductions & ~2u) return refused("sums in an order or a precision that is not fixed were not refused");
    *n_proposals = 0;
    for (uint64_t splits : {1, 2}) {
        uint64_t workspace = splits > 1 ? 4 * splits * of_d.rows * of_d.columns : 0;
        if (*n_proposals >= n_asked || workspace > wants.workspace) break;
        Algorithm algorithm{MARK, product_of(product, of_a, of_b, of_d), splits, workspace, {}, {}};
        memcpy(algorithm.alignments, wants.alignments, sizeof wants.alignments);
        proposals[(*n_proposals)++] = Proposal{algorithm, (size_t)workspace, OK, 1, {}};
    }
    return OK;
}

API cublasLtMatmul(void* handle, void* desc, const float* alpha, const void* a, void* of_a, const void* b, void* of_b, const float* beta,
                   const void* c, void* of_c, void* d, void* of_d, const Algorithm* algorithm, void* workspace, size_t n_workspace,
                   void* stream) {
    BEGIN;
    if (const char* code = getenv("FAKE_CUBLAS_REFUSE")) return atoi(code);
    if (!handles.count(handle) || !descs.count(desc)) return refused("a handle that is none");
    for (void* layout : {of_a, of_b, of_c, of_d})
        if (!layouts.count(layout)) return refused("a layout that is none");
    Work work{*(Desc*)desc, *(Layout*)of_a, *(Layout*)of_b, *(Layout*)of_d, a, b, d, workspace, *alpha, *beta, algorithm->splits};
    if (const char* problem = problem_of(work.desc, work.a, work.b, work.d)) return refused(problem);
    if (c != d || of_c != of_d) return refused("what is added to is not what is written");
    if (algorithm->mark != MARK || algorithm->product != product_of(work.desc, work.a, work.b, work.d))
        return refused("an algorithm that was made for another product");
    const void* operands[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if ((uint64_t)operands[i] % algorithm->alignments[i]) return refused("memory less aligned than was said");
    auto bytes = [](const Layout& it) { return (it.stride * (it.columns - 1) + it.rows) * bytes_of(it.type); };
    if (!lies_on_device(a, bytes(work.a)) || !lies_on_device(b, bytes(work.b)) || !lies_on_device(d, bytes(work.d)))
        return refused("memory that is not the device's");
    if (algorithm->workspace > n_workspace || (n_workspace && !lies_on_device(workspace, n_workspace)))
        return refused("a workspace that is not there");
    auto enqueue = driver<int (*)(void*, const char*, int (*)(void*), void*)>("fake_enqueue");
    return enqueue(stream, "cublasLtMatmul", multiply, new Work(work)) ? INTERNAL_ERROR : OK;
}
