// A libcuda.so that runs the project's kernels on the CPU: the whole host path can be tried where there is no GPU.
//
// It is stricter than a driver. Work on a stream is done only when somebody waits for it, so that memory touched too early
// gives wrong results instead of luck. Every copy and every launch is checked: a current context, known memory, the kernel's
// parameters and limits as the embedded PTX declares them.
//
// Environment:
//   FAKE_CUDA_DEVICES=N       how many devices; 0 makes cuInit fail as a driver without a device does
//   FAKE_CUDA_VERSION=12040   what the driver says it is
//   FAKE_CUDA_MEMORY=BYTES    of each device
//   FAKE_CUDA_FAIL=N          the N-th kernel (from 1) touches memory that is not there: an error that stays
//   FAKE_CUDA_SKIP=N          the N-th kernel does nothing and says nothing
//   FAKE_CUDA_OVERRUN=1       every launch writes a byte beyond some memory, for sanitizers to see
//   FAKE_CUDA_REVERSE=1       threads and blocks run in the opposite order
//   FAKE_CUDA_STATS=FILE      at the end, what was used
#include "shim.h"

#include "../../src/gpu/kernels/topk.cu"
#include "../../src/gpu/kernels/score.cu"
#include "../../src/gpu/kernels/patch.cu"
#include "../../src/gpu/kernels/low_rank.cu"
#include "../../src/gpu/kernels/passes.cu"
#include "../../src/gpu/kernels/head.cu"
#include "../../src/gpu/kernels/sparse.cu"
#include "../../src/gpu/kernels/attention.cu"
#include "../../src/gpu/kernels/attention_64.cu"
#include "../../src/gpu/kernels/attention_80.cu"
#include "../../src/gpu/kernels/attention_96.cu"
#include "../../src/gpu/kernels/attention_128.cu"

#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#define SEEN extern "C" __attribute__((visibility("default")))
#define API SEEN int

namespace {

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
};

uint64_t number(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

// --- kernels by name, called with the parameters of a launch

struct Kernel {
    std::vector<size_t> sizes; // of the parameters
    std::function<void(void**)> call;
};

template <class... A, size_t... I> void apply(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
    kernel(*(A*)params[I]...);
}

template <class... A> Kernel kernel_of(void (*kernel)(A...)) {
    return {{sizeof(A)...}, [kernel](void** params) { apply(kernel, params, std::index_sequence_for<A...>()); }};
}

#define KERNEL(name) {#name, kernel_of(name)}
#define FLOAT_KERNELS(name) KERNEL(name##_bf16), KERNEL(name##_f16), KERNEL(name##_f32)
#define MMA_KERNELS_OF(type, d) \
    KERNEL(attention_mma_##type##_##d), KERNEL(attention_dq_mma_##type##_##d), KERNEL(attention_dkv_mma_##type##_##d)
#define MMA_KERNELS(d) MMA_KERNELS_OF(bf16, d), MMA_KERNELS_OF(f16, d)
const std::map<std::string, Kernel>& kernels() {
    static const std::map<std::string, Kernel> all = {
        KERNEL(top1_u16),         KERNEL(top1_u32),         KERNEL(topk_warp_u16),   KERNEL(topk_warp_u32),
        KERNEL(topk_block_u16),   KERNEL(topk_block_u32),   KERNEL(score_keys),      KERNEL(patch_rows_bf16),
        KERNEL(patch_rows_f16),   KERNEL(patch_rows_f32),   KERNEL(patch_terms_bf16), KERNEL(patch_terms_f16),
        KERNEL(patch_terms_f32),  KERNEL(originals_u16),    KERNEL(originals_u32),   KERNEL(low_rank_bf16),
        KERNEL(low_rank_f16),     KERNEL(low_rank_f32),
        // The trainer's.
        FLOAT_KERNELS(rms_norm),  FLOAT_KERNELS(rms_norm_back), FLOAT_KERNELS(head_norm), FLOAT_KERNELS(head_norm_back),
        FLOAT_KERNELS(rope),      FLOAT_KERNELS(swiglu),    FLOAT_KERNELS(swiglu_back), FLOAT_KERNELS(add_bias),
        FLOAT_KERNELS(cross_entropy), FLOAT_KERNELS(gather_dot), FLOAT_KERNELS(patch_entries), FLOAT_KERNELS(patch_bias),
        KERNEL(take_rows_wide),   KERNEL(take_rows_narrow), KERNEL(put_rows_wide),   KERNEL(put_rows_narrow),
        KERNEL(argmax_rows),      KERNEL(add_slices),       KERNEL(take_entries),    KERNEL(adamw),
        KERNEL(sum_of_squares),
        FLOAT_KERNELS(attention), FLOAT_KERNELS(attention_append), FLOAT_KERNELS(attention_delta), FLOAT_KERNELS(attention_dq),
        FLOAT_KERNELS(attention_dkv),
        MMA_KERNELS(64), MMA_KERNELS(80), MMA_KERNELS(96), MMA_KERNELS(128),
    };
    return all;
}

// --- handles

struct Function {
    std::string name;
    const Kernel* kernel;
    unsigned most_threads;
    size_t most_shared = 48 << 10;
};
struct Entry {
    std::vector<size_t> sizes;
    unsigned most_threads;
};
struct Module {
    std::map<std::string, Entry> entries;
    std::vector<std::unique_ptr<Function>> functions;
};
struct Stream {
    std::deque<std::function<int()>> work;
};
struct Event {
    Stream* stream = nullptr;
    bool is_done = true;
    uint64_t n_records = 0;
};

std::recursive_mutex lock;
std::set<Stream*> streams;
Stream default_stream;
std::map<uintptr_t, size_t> on_device, on_host;
uint64_t n_device_bytes, most_device_bytes, n_host_bytes, most_host_bytes, n_launched, most_streams, most_waiting;
std::map<std::string, uint64_t> launches;
int sticky = OK;
thread_local void* current_context;
int the_context;

struct AtTheEnd {
    ~AtTheEnd() {
        const char* path = getenv("FAKE_CUDA_STATS");
        if (!path) return;
        std::ofstream out(path);
        out << "most_device_bytes " << most_device_bytes << "\nmost_host_bytes " << most_host_bytes << "\nleft_device_bytes "
            << n_device_bytes << "\nleft_host_bytes " << n_host_bytes << "\nmost_streams " << most_streams << "\nmost_waiting "
            << most_waiting << "\n";
        for (auto& [name, n] : launches) out << name << " " << n << "\n";
    }
} at_the_end;

// What every call begins with. A driver that met a sticky error answers with nothing else.
#define BEGIN                                             \
    std::lock_guard<std::recursive_mutex> guard(lock);    \
    if (sticky != OK) return sticky
#define IN_CONTEXT \
    BEGIN;         \
    if (!current_context) return INVALID_CONTEXT

bool lies_in(const std::map<uintptr_t, size_t>& all, uintptr_t at, size_t n) {
    auto after = all.upper_bound(at);
    if (after == all.begin()) return false;
    --after;
    return at - after->first <= after->second && n <= after->second - (at - after->first);
}

Stream* stream_of(void* handle) {
    if (!handle) return &default_stream;
    return streams.count((Stream*)handle) ? (Stream*)handle : nullptr;
}

int drain(Stream& stream) {
    while (!stream.work.empty()) {
        auto work = std::move(stream.work.front());
        stream.work.pop_front();
        if (int code = work()) return sticky = code;
    }
    return OK;
}

int drain_all() {
    if (int code = drain(default_stream)) return code;
    for (Stream* stream : streams)
        if (int code = drain(*stream)) return code;
    return OK;
}

int later(void* handle, std::function<int()> work) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->work.push_back(std::move(work));
    if (stream->work.size() > most_waiting) most_waiting = stream->work.size();
    return OK;
}

// Does what was launched, unless it is to fail or to be skipped.
template <class F> int counted(const std::string& name, F work) {
    n_launched++;
    launches[name]++;
    if (n_launched == number("FAKE_CUDA_FAIL", 0)) return ILLEGAL_ADDRESS;
    if (n_launched == number("FAKE_CUDA_SKIP", 0)) return OK;
    if (number("FAKE_CUDA_OVERRUN", 0) && !on_device.empty()) {
        auto [at, n] = *on_device.begin();
        ((volatile char*)at)[n] = 1;
    }
    return work();
}

// The entries of a PTX text, with the sizes of their parameters and their bound on threads.
std::map<std::string, Entry> entries_of(const std::string& ptx) {
    std::map<std::string, Entry> entries;
    const std::string mark = ".visible .entry ";
    for (size_t at = ptx.find(mark); at != std::string::npos; at = ptx.find(mark, at + 1)) {
        size_t open = ptx.find('(', at), close = ptx.find(')', open), brace = ptx.find('{', close);
        Entry entry{{}, 1024};
        std::istringstream params(ptx.substr(open + 1, close - open - 1));
        for (std::string word; params >> word;) {
            if (word == ".u64") entry.sizes.push_back(8);
            if (word == ".u32" || word == ".f32") entry.sizes.push_back(4);
        }
        std::string directives = ptx.substr(close, brace - close);
        size_t bound = directives.find(".maxntid ");
        if (bound != std::string::npos) entry.most_threads = atoi(directives.c_str() + bound + 9);
        entries[ptx.substr(at + mark.size(), open - at - mark.size())] = entry;
    }
    return entries;
}

} // namespace

// --- devices and contexts

API cuInit(unsigned) {
    sim::is_reversed = number("FAKE_CUDA_REVERSE", 0) != 0;
    return number("FAKE_CUDA_DEVICES", 1) == 0 ? NO_DEVICE : OK;
}
API cuDriverGetVersion(int* version) {
    *version = (int)number("FAKE_CUDA_VERSION", 12040);
    return OK;
}
API cuDeviceGetCount(int* n) {
    *n = (int)number("FAKE_CUDA_DEVICES", 1);
    return OK;
}
API cuDeviceGet(int* device, int i) {
    if (i < 0 || i >= (int)number("FAKE_CUDA_DEVICES", 1)) return INVALID_DEVICE;
    *device = i;
    return OK;
}
API cuDeviceGetName(char* name, int n, int device) {
    snprintf(name, n, "Fake GPU %d", device);
    return OK;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
    case 75: *value = (int)number("FAKE_CUDA_MAJOR", 9); break; // compute capability
    case 76: *value = 0; break;
    case 16: *value = 4; break;   // multiprocessors
    case 115: *value = 1; break;  // memory pools
    default: *value = 0;
    }
    return OK;
}
API cuDeviceTotalMem_v2(size_t* n, int) {
    *n = number("FAKE_CUDA_MEMORY", 1 << 30);
    return OK;
}
API cuDevicePrimaryCtxRetain(void** context, int) {
    BEGIN;
    *context = &the_context;
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API cuCtxGetCurrent(void** context) {
    *context = current_context;
    return OK;
}
API cuCtxSetCurrent(void* context) {
    current_context = context;
    return OK;
}
API cuCtxSynchronize() {
    IN_CONTEXT;
    return drain_all();
}

// --- memory

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    IN_CONTEXT;
    *total = number("FAKE_CUDA_MEMORY", 1 << 30);
    *free = *total - n_device_bytes;
    return OK;
}
API cuMemAlloc_v2(uint64_t* at, size_t n) {
    IN_CONTEXT;
    if (n == 0) return INVALID_VALUE;
    if (n_device_bytes + n > number("FAKE_CUDA_MEMORY", 1 << 30)) return OUT_OF_MEMORY;
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, n)) return OUT_OF_MEMORY;
    memset(memory, 0xa5, n);
    on_device[(uintptr_t)memory] = n;
    n_device_bytes += n;
    if (n_device_bytes > most_device_bytes) most_device_bytes = n_device_bytes;
    *at = (uint64_t)memory;
    return OK;
}
API cuMemFree_v2(uint64_t at) {
    IN_CONTEXT;
    auto found = on_device.find(at);
    if (found == on_device.end()) return INVALID_VALUE;
    if (int code = drain_all()) return code;
    n_device_bytes -= found->second;
    on_device.erase(found);
    free((void*)at);
    return OK;
}
API cuMemHostAlloc(void** at, size_t n, unsigned) {
    IN_CONTEXT;
    if (n == 0 || posix_memalign(at, 4096, n)) return INVALID_VALUE;
    memset(*at, 0x5a, n);
    on_host[(uintptr_t)*at] = n;
    n_host_bytes += n;
    if (n_host_bytes > most_host_bytes) most_host_bytes = n_host_bytes;
    return OK;
}
API cuMemFreeHost(void* at) {
    IN_CONTEXT;
    auto found = on_host.find((uintptr_t)at);
    if (found == on_host.end()) return INVALID_VALUE;
    if (int code = drain_all()) return code;
    n_host_bytes -= found->second;
    on_host.erase(found);
    free(at);
    return OK;
}
// From pinned memory a copy happens when the stream comes to it; from any other, as a driver may, at once.
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void* stream) {
    IN_CONTEXT;
    if (!stream_of(stream)) return INVALID_HANDLE;
    if (!lies_in(on_device, to, n)) return INVALID_VALUE;
    if (lies_in(on_host, (uintptr_t)from, n)) return later(stream, [=] { return memcpy((void*)to, from, n), OK; });
    if (int code = drain(*stream_of(stream))) return code;
    memcpy((void*)to, from, n);
    return OK;
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void* stream) {
    IN_CONTEXT;
    if (!stream_of(stream)) return INVALID_HANDLE;
    if (!lies_in(on_device, from, n)) return INVALID_VALUE;
    if (lies_in(on_host, (uintptr_t)to, n)) return later(stream, [=] { return memcpy(to, (void*)from, n), OK; });
    if (int code = drain(*stream_of(stream))) return code;
    memcpy(to, (void*)from, n);
    return OK;
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void* stream) {
    IN_CONTEXT;
    if (!lies_in(on_device, from, n) || !lies_in(on_device, to, n)) return INVALID_VALUE;
    return later(stream, [=] { return memmove((void*)to, (void*)from, n), OK; });
}
API cuMemsetD8Async(uint64_t at, unsigned char value, size_t n, void* stream) {
    IN_CONTEXT;
    if (!lies_in(on_device, at, n)) return INVALID_VALUE;
    return later(stream, [=] { return memset((void*)at, value, n), OK; });
}

// --- streams and events

API cuStreamCreate(void** stream, unsigned) {
    IN_CONTEXT;
    Stream* made = new Stream;
    streams.insert(made);
    if (streams.size() > most_streams) most_streams = streams.size();
    *stream = made;
    return OK;
}
API cuStreamDestroy_v2(void* handle) {
    IN_CONTEXT;
    Stream* stream = (Stream*)handle;
    if (!streams.count(stream)) return INVALID_HANDLE;
    int code = drain(*stream);
    streams.erase(stream);
    delete stream;
    return code;
}
API cuStreamSynchronize(void* handle) {
    IN_CONTEXT;
    Stream* stream = stream_of(handle);
    return stream ? drain(*stream) : INVALID_HANDLE;
}
API cuEventCreate(void** event, unsigned) {
    IN_CONTEXT;
    *event = new Event;
    return OK;
}
API cuEventDestroy_v2(void* event) {
    IN_CONTEXT;
    Event* it = (Event*)event;
    if (!it->is_done && it->stream)
        if (int code = drain(*it->stream)) return code;
    delete it;
    return OK;
}
API cuEventRecord(void* handle, void* stream) {
    IN_CONTEXT;
    Event* event = (Event*)handle;
    event->stream = stream_of(stream);
    event->is_done = false;
    uint64_t n = ++event->n_records;
    return later(stream, [=] {
        if (event->n_records == n) event->is_done = true;
        return OK;
    });
}
API cuEventQuery(void* event) {
    IN_CONTEXT;
    return ((Event*)event)->is_done ? OK : NOT_READY;
}
API cuEventSynchronize(void* handle) {
    IN_CONTEXT;
    Event* event = (Event*)handle;
    while (!event->is_done && !event->stream->work.empty()) {
        auto work = std::move(event->stream->work.front());
        event->stream->work.pop_front();
        if (int code = work()) return sticky = code;
    }
    return OK;
}
// --- modules and launches

API cuModuleLoadData(void** module, const void* image) {
    IN_CONTEXT;
    std::string ptx((const char*)image);
    if (ptx.find(".version 8.0") == std::string::npos || ptx.find(".target sm_80") == std::string::npos) return INVALID_IMAGE;
    *module = new Module{entries_of(ptx), {}};
    return OK;
}
API cuModuleUnload(void* module) {
    IN_CONTEXT;
    delete (Module*)module;
    return OK;
}
API cuModuleGetFunction(void** function, void* handle, const char* name) {
    IN_CONTEXT;
    Module* module = (Module*)handle;
    auto entry = module->entries.find(name);
    auto kernel = kernels().find(name);
    if (entry == module->entries.end() || kernel == kernels().end()) return NOT_FOUND;
    if (entry->second.sizes != kernel->second.sizes) {
        fprintf(stderr, "fake driver: the PTX of %s declares other parameters than its source\n", name);
        return INVALID_IMAGE;
    }
    module->functions.emplace_back(new Function{name, &kernel->second, entry->second.most_threads});
    *function = module->functions.back().get();
    return OK;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    IN_CONTEXT;
    if (attribute == 8 && value > 227 << 10) return INVALID_VALUE;
    if (attribute == 8) ((Function*)function)->most_shared = value;
    return OK;
}
API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** params, void** extra) {
    IN_CONTEXT;
    Function* function = (Function*)handle;
    bool fits = gx && gy && gz && gx <= 0x7fffffff && gy <= 65535 && gz <= 65535 && bx && by == 1 && bz == 1;
    if (!fits || bx > function->most_threads || shared > function->most_shared || extra) return INVALID_VALUE;
    // Parameters are read now: the caller's may be gone when the kernel runs.
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < function->kernel->sizes.size(); i++) {
        values.emplace_back((char*)params[i], (char*)params[i] + function->kernel->sizes[i]);
    }
    return later(stream, [=]() mutable {
        return counted(function->name, [&] {
            std::vector<void*> pointers;
            for (auto& value : values) pointers.push_back(value.data());
            sim::launch(function->name.c_str(), Dim{gx, gy, gz}, bx, shared, [&] { function->kernel->call(pointers.data()); });
            return (int)OK;
        });
    });
}

// --- for libraries beside the driver: work of a stream, which is called once when the stream comes to it; what lies on the device

SEEN int fake_enqueue(void* stream, const char* name, int (*work)(void*), void* data) {
    IN_CONTEXT;
    std::string of = name;
    return later(stream, [=] { return counted(of, [&] { return work(data); }); });
}
SEEN bool fake_lies_on_device(uint64_t at, size_t n) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return lies_in(on_device, at, n);
}

// --- errors by name

API cuGetErrorName(int code, const char** name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return OK;
}
API cuGetErrorString(int, const char** words) {
    *words = "an error of the fake driver";
    return OK;
}
