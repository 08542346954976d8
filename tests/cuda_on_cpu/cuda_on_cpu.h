// CUDA kernels on one CPU thread, for tests on machines without a GPU (g++, C++20, -DMFUSER_ON_CPU).
//
// Blocks run one after another; the threads of a block are fibers. Each runs until it meets a barrier or a warp
// primitive, warps and lanes in a seeded random order, so that a missing __syncthreads or __syncwarp gives wrong numbers.
// What a GPU leaves undefined ends the process with a message: a barrier that some threads do not reach, lanes of a warp
// at different primitives, writes behind the dynamic shared memory. Shared memory is NaN (0xFF) before each block.
//
// Known: threadIdx blockIdx blockDim gridDim warpSize dim3, {float,int,uint}{2,3,4} and make_*, __nv_bfloat16, __half,
// __syncthreads, __syncwarp, __shfl_{,up_,down_,xor_}sync, __{ballot,any,all,reduce_add,match_any}_sync, atomicAdd, __ldg,
// __threadfence, __popc, __ffs, __clz, __{float,int,uint}_as_{float,int,uint}, rsqrtf, min, max.
// MFUSER_CPU_SEED in the environment changes the order of threads. mfuser_gemm_ex stands for cublasGemmEx.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>
#include <type_traits>

// our own switch where we know how to write one: swapcontext makes a system call each time and takes ten times as long
#ifndef __x86_64__
#define MFUSER_CPU_UCONTEXT 1
#endif
#ifdef MFUSER_CPU_UCONTEXT
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))

// One CPU thread runs all, so a thread's copy is the block's copy; and the thread-local memory of this library, which
// holds nothing else, can be found and poisoned before each block.
#define __shared__ static thread_local __attribute__((used))

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(2) __nv_bfloat16 { uint16_t bits; };
using __half = _Float16;

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7FFF};  // the GPU's NaN; rounding could carry a NaN's bits into infinity
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    }
    return "unrecognized error code";
}

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace on_cpu {

inline constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
inline constexpr size_t kMaxShared = 227 * 1024;  // of sm_90
inline constexpr size_t kFence = 4096;            // bytes on either side of the dynamic shared memory
inline constexpr uint16_t kFenceMark = 0xFFA5;    // NaN as bf16, fp16 and fp32, so that reading it shows up, too
inline constexpr size_t kStack = 128 * 1024;

enum class Op : int { sync, shuffle, ballot, any, all, add, match };
inline const char* const kOpNames[] = {"__syncwarp",  "a shuffle",  "__ballot_sync",
                                       "__any_sync", "__all_sync", "__reduce_add_sync", "__match_any_sync"};

struct Place {
    const char* file = "";
    int line = 0;
};

struct Fiber {
#ifdef MFUSER_CPU_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    uint3 index{};
    Place waits;
};

// what a lane brings to a warp primitive, and what it takes away
struct Slot {
    Op op;
    uint32_t mask;
    int source;
    uint64_t value, result;
};

// bit masks over lanes; lanes beyond the block's end count as exited
struct Warp {
    uint32_t ready, pending, barrier, exited, present;
    Slot slots[32];
};

struct Machine {
    std::mutex busy;
    Fiber main, fibers[kMaxThreads];
    Warp warps[kMaxWarps];
    bool prepared = false;
    const char* name = "";
    void (*call)(const void*) = nullptr;
    const void* arguments = nullptr;
    int threads = 0, warp = 0, lane = 0;
    uint32_t random = 1, spin = 0;
    unsigned char* static_shared = nullptr;
    size_t static_bytes = 0, shared_bytes = 0;
    alignas(128) unsigned char shared[kFence + kMaxShared + kFence];
};

inline Machine machine;

inline uint32_t draw() {
    uint32_t x = machine.random;
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    return machine.random = x;
}

[[noreturn]] inline void fail(const char* what, int thread, Place place, const char* more = "") {
    uint3 t = machine.fibers[thread].index;
    fprintf(stderr, "cuda_on_cpu: %s, block (%u, %u, %u), thread (%u, %u, %u): %s (%s:%d)%s\n", machine.name, blockIdx.x,
            blockIdx.y, blockIdx.z, t.x, t.y, t.z, what, place.file, place.line, more);
    fflush(stderr);
    abort();
}

#ifdef MFUSER_CPU_UCONTEXT
inline void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Fiber& fiber, unsigned char* stack, size_t size, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
#else
// System V: rbx, rbp and r12 to r15 belong to the caller, all else is dead across a call
__attribute__((naked, noinline, noipa)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void swap(Fiber& from, Fiber& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Fiber& fiber, unsigned char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to; it also aligns the stack as a call does
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}
#endif

inline void run(Fiber& from, int warp, int lane) {
    machine.warp = warp;
    machine.lane = lane;
    Fiber& to = machine.fibers[32 * warp + lane];
    threadIdx = to.index;
    swap(from, to);
}

// the lanes that are ready take turns from a random one on, upwards or downwards
inline int next_lane(uint32_t ready) {
    uint32_t turned = std::rotr(ready, static_cast<int>(machine.spin & 31));
    int offset = machine.spin & 32 ? 31 - std::countl_zero(turned) : std::countr_zero(turned);
    return static_cast<int>((offset + machine.spin) & 31);
}

// leave the current fiber until something makes its lane ready
inline void suspend() {
    Fiber& self = machine.fibers[32 * machine.warp + machine.lane];
    if (uint32_t ready = machine.warps[machine.warp].ready) {
        run(self, machine.warp, next_lane(ready));
    } else {
        swap(self, machine.main);
    }
}

// if every lane of `mask` that still runs has arrived: give each its result and make all ready
inline bool complete(Warp& warp, uint32_t mask) {
    uint32_t group = mask & ~warp.exited;
    if (group & ~warp.pending) return false;
    const Op op = warp.slots[std::countr_zero(group)].op;
    uint32_t votes = 0, sum = 0;
    for (uint32_t left = group; left; left &= left - 1) {
        int lane = std::countr_zero(left);
        const Slot& slot = warp.slots[lane];
        if (slot.op != op || slot.mask != mask) {
            int thread = 32 * machine.warp + lane;
            char more[200];
            snprintf(more, sizeof more, ", mask 0x%08x; another lane of its warp is in %s, mask 0x%08x", slot.mask,
                     kOpNames[static_cast<int>(op)], mask);
            fail(kOpNames[static_cast<int>(slot.op)], thread, machine.fibers[thread].waits, more);
        }
        if (slot.value) votes |= 1u << lane;
        sum += static_cast<uint32_t>(slot.value);
    }
    for (uint32_t left = group; left; left &= left - 1) {
        Slot& slot = warp.slots[std::countr_zero(left)];
        switch (op) {
            case Op::sync: break;
            // a lane outside the group has nothing to give: all ones, NaN
            case Op::shuffle: slot.result = group >> slot.source & 1 ? warp.slots[slot.source].value : ~uint64_t{0}; break;
            case Op::ballot: slot.result = votes; break;
            case Op::any: slot.result = votes != 0; break;
            case Op::all: slot.result = votes == group; break;
            case Op::add: slot.result = sum; break;
            case Op::match:
                slot.result = 0;
                for (uint32_t other = group; other; other &= other - 1) {
                    const int lane = std::countr_zero(other);
                    if (warp.slots[lane].value == slot.value) slot.result |= 1u << lane;
                }
                break;
        }
    }
    warp.pending &= ~group;
    warp.ready |= group;
    machine.spin = draw();
    return true;
}

inline uint64_t meet(Op op, uint32_t mask, uint64_t value, int source, Place place) {
    Warp& warp = machine.warps[machine.warp];
    const uint32_t bit = 1u << machine.lane;
    const int thread = 32 * machine.warp + machine.lane;
    if (!(mask & bit)) fail("calls a warp primitive whose mask leaves it out", thread, place);
    Slot& slot = warp.slots[machine.lane];
    slot.op = op, slot.mask = mask, slot.source = source, slot.value = value;
    machine.fibers[thread].waits = place;
    warp.ready &= ~bit;
    warp.pending |= bit;
    if (!complete(warp, mask)) suspend();
    return slot.result;
}

inline void barrier(Place place) {
    Warp& warp = machine.warps[machine.warp];
    machine.fibers[32 * machine.warp + machine.lane].waits = place;
    warp.ready &= ~(1u << machine.lane);
    warp.barrier |= 1u << machine.lane;
    suspend();
}

// a fiber's whole life: one kernel call per block
inline void live() {
    for (;;) {
        machine.call(machine.arguments);
        Warp& warp = machine.warps[machine.warp];
        warp.ready &= ~(1u << machine.lane);
        warp.exited |= 1u << machine.lane;
        // the others may have been waiting for this lane alone
        for (uint32_t left = warp.pending; left; left &= left - 1) {
            int lane = std::countr_zero(left);
            if (warp.pending >> lane & 1) complete(warp, warp.slots[lane].mask);
        }
        suspend();
    }
}

inline void prepare_fibers() {
    if (machine.prepared) return;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), each = kStack + page;
    void* memory =
        mmap(nullptr, each * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("cuda_on_cpu: stacks");
        abort();
    }
    for (int i = 0; i < kMaxThreads; ++i) {
        unsigned char* bottom = static_cast<unsigned char*>(memory) + i * each;
        mprotect(bottom, page, PROT_NONE);  // a stack that overflows faults
        // tops at different offsets: with equal ones the fibers of a warp would evict each other from the cache
        prepare(machine.fibers[i], bottom + page, kStack - 192 * (i % 32), live);
    }
    if (const char* seed = getenv("MFUSER_CPU_SEED")) machine.random = 2 * static_cast<uint32_t>(atoi(seed)) + 1;
    machine.prepared = true;
}

// the __shared__ variables of all kernels in this library
inline void find_static_shared() {
    static thread_local __attribute__((used)) volatile char anchor;
    anchor = 0;  // the memory of a thread exists from the first access on
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
                unsigned char* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
                const size_t size = info->dlpi_phdr[i].p_memsz;
                const uintptr_t offset = reinterpret_cast<uintptr_t>(&anchor) - reinterpret_cast<uintptr_t>(begin);
                if (!begin || offset >= size) continue;
                machine.static_shared = begin, machine.static_bytes = size;
                return 1;
            }
            return 0;
        },
        nullptr);
}

inline unsigned char* dynamic_shared() { return machine.shared + kFence; }

inline void poison_shared() {
    memset(machine.static_shared, 0xFF, machine.static_bytes);
    unsigned char* begin = dynamic_shared();
    memset(begin, 0xFF, machine.shared_bytes);
    for (size_t i = 0; i < kFence; i += 2) {
        memcpy(begin - kFence + i, &kFenceMark, 2);
        memcpy(begin + machine.shared_bytes + i, &kFenceMark, 2);
    }
}

inline void check_fences() {
    const unsigned char* begin = dynamic_shared();
    const unsigned char* mark = reinterpret_cast<const unsigned char*>(&kFenceMark);
    for (size_t i = 0; i < kFence; ++i) {
        const bool before = begin[static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(kFence)] != mark[i % 2];
        if (!before && begin[machine.shared_bytes + i] == mark[i % 2]) continue;
        fprintf(stderr, "cuda_on_cpu: %s, block (%u, %u, %u): wrote %s its %zu bytes of dynamic shared memory\n", machine.name,
                blockIdx.x, blockIdx.y, blockIdx.z, before ? "before" : "behind", machine.shared_bytes);
        fflush(stderr);
        abort();
    }
}

// every thread of the block is at a barrier or has exited: all must be at the same one, or all at their end
inline bool next_phase(int warps) {
    int waiting = -1, gone = -1;
    for (int w = 0; w < warps; ++w) {
        const Warp& warp = machine.warps[w];
        if (warp.pending) {
            int lane = std::countr_zero(warp.pending);
            char more[200];
            snprintf(more, sizeof more, " waits for lanes 0x%08x of its warp, which have gone elsewhere",
                     warp.slots[lane].mask & ~warp.exited & ~warp.pending);
            int thread = 32 * w + lane;
            fail(kOpNames[static_cast<int>(warp.slots[lane].op)], thread, machine.fibers[thread].waits, more);
        }
        if (warp.barrier) {
            if (waiting < 0) waiting = 32 * w + std::countr_zero(warp.barrier);
            for (uint32_t left = warp.barrier; left; left &= left - 1) {
                int thread = 32 * w + std::countr_zero(left);
                const Place &a = machine.fibers[waiting].waits, &b = machine.fibers[thread].waits;
                if (a.line == b.line && !strcmp(a.file, b.file)) continue;
                char more[400];
                snprintf(more, sizeof more, ", while another thread waits at %s:%d", a.file, a.line);
                fail("divergent barrier: waits in __syncthreads", thread, b, more);
            }
        }
        if (warp.exited & warp.present && gone < 0) gone = 32 * w + std::countr_zero(warp.exited & warp.present);
    }
    if (waiting < 0) return false;
    if (gone >= 0) {
        uint3 t = machine.fibers[gone].index;
        char more[100];
        snprintf(more, sizeof more, ", while thread (%u, %u, %u) has returned", t.x, t.y, t.z);
        fail("divergent barrier: waits in __syncthreads", waiting, machine.fibers[waiting].waits, more);
    }
    return true;
}

inline void run_block() {
    const int warps = (machine.threads + 31) / 32;
    int order[kMaxWarps];
    for (int w = 0; w < warps; ++w) {
        const int count = std::min(32, machine.threads - 32 * w);
        Warp& warp = machine.warps[w];
        warp.present = count == 32 ? ~0u : (1u << count) - 1;
        warp.ready = warp.present, warp.exited = ~warp.present, warp.pending = warp.barrier = 0;
        order[w] = w;
    }
    poison_shared();
    do {
        for (int w = warps - 1; w > 0; --w) std::swap(order[w], order[draw() % (w + 1)]);
        for (int w = 0; w < warps; ++w) {
            Warp& warp = machine.warps[order[w]];
            if (warp.barrier) warp.ready = warp.barrier, warp.barrier = 0;
            machine.spin = draw();
            if (warp.ready) run(machine.main, order[w], next_lane(warp.ready));
        }
    } while (next_phase(warps));
    check_fences();
}

template <typename... P>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
                   std::type_identity_t<P>... args) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
    if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (shared_bytes > kMaxShared) return cudaErrorInvalidValue;
    std::lock_guard<std::mutex> lock(machine.busy);
    prepare_fibers();
    find_static_shared();
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> args;
    } call{kernel, {args...}};
    machine.name = name;
    machine.arguments = &call;
    machine.call = [](const void* opaque) {
        const Call& c = *static_cast<const Call*>(opaque);
        std::apply(c.kernel, c.args);
    };
    machine.threads = static_cast<int>(threads);
    machine.shared_bytes = shared_bytes;
    blockDim = block, gridDim = grid;
    for (unsigned i = 0; i < threads; ++i) {
        machine.fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    // from a random block on, wrapping around: nothing may rely on the order of blocks
    const uint64_t first = draw() % blocks;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = (first + i) % blocks;
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y)};
        run_block();
    }
    return cudaSuccess;
}

template <typename T>
T shuffle(uint32_t mask, T value, int source, Place place) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = meet(Op::shuffle, mask, bits, source, place);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace on_cpu

// where the caller stands, for messages
#define MFUSER_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MFUSER_CPU_HERE) { on_cpu::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, MFUSER_CPU_HERE) { on_cpu::meet(on_cpu::Op::sync, mask, 0, 0, {file, line}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MFUSER_CPU_HERE) {
    const int segment = on_cpu::machine.lane & ~(width - 1);
    return on_cpu::shuffle(mask, value, segment | (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MFUSER_CPU_HERE) {
    const int lane = on_cpu::machine.lane, source = lane - static_cast<int>(delta);
    return on_cpu::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MFUSER_CPU_HERE) {
    const int lane = on_cpu::machine.lane, source = lane + static_cast<int>(delta);
    return on_cpu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, MFUSER_CPU_HERE) {
    const int lane = on_cpu::machine.lane, source = lane ^ lanes;
    return on_cpu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MFUSER_CPU_HERE) {
    return static_cast<unsigned>(on_cpu::meet(on_cpu::Op::ballot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, MFUSER_CPU_HERE) {
    return static_cast<int>(on_cpu::meet(on_cpu::Op::any, mask, predicate != 0, 0, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, MFUSER_CPU_HERE) {
    return static_cast<int>(on_cpu::meet(on_cpu::Op::all, mask, predicate != 0, 0, {file, line}));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, MFUSER_CPU_HERE) {
    return static_cast<unsigned>(on_cpu::meet(on_cpu::Op::add, mask, value, 0, {file, line}));
}
inline int __reduce_add_sync(unsigned mask, int value, MFUSER_CPU_HERE) {
    return static_cast<int>(on_cpu::meet(on_cpu::Op::add, mask, static_cast<unsigned>(value), 0, {file, line}));
}
inline unsigned __match_any_sync(unsigned mask, int value, MFUSER_CPU_HERE) {
    return static_cast<unsigned>(on_cpu::meet(on_cpu::Op::match, mask, static_cast<unsigned>(value), 0, {file, line}));
}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    T old = *address;
    *address = old + value;
    return old;
}
template <typename T>
T __ldg(const T* address) { return *address; }
inline void __threadfence() {}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
using std::max;
using std::min;

// cublasGemmEx as a plain loop, for launchers that are handed its address: column by column, sums in fp32. As cuBLAS, it
// gives the status 1 without a handle, 7 for sizes that do not fit, 15 for what it does not know.
extern "C" __attribute__((visibility("default"), used)) inline int mfuser_gemm_ex(
    void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
    const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int /*algorithm*/) {
    enum { kFloat = 0, kHalf = 2, kBfloat16 = 14 };
    const auto known = [](int type) { return type == kFloat || type == kHalf || type == kBfloat16; };
    if (!handle) return 1;
    if (m < 1 || n < 1 || k < 1 || lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return 7;
    if (!known(a_type) || a_type != b_type || (c_type != a_type && c_type != kFloat)) return 15;
    if (compute != 68 && (compute != 77 || a_type != kFloat)) return 15;  // CUBLAS_COMPUTE_32F, _32F_FAST_TF32
    const auto get = [](const void* data, int type, int64_t i) {
        if (type == kFloat) return static_cast<const float*>(data)[i];
        if (type == kHalf) return __half2float(static_cast<const __half*>(data)[i]);
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    };
    const float times = *static_cast<const float*>(alpha), plus = *static_cast<const float*>(beta);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
            float sum = 0.0f;
            for (int64_t l = 0; l < k; ++l) {
                sum += get(a, a_type, transpose_a ? l + i * lda : i + l * lda) *
                       get(b, b_type, transpose_b ? j + l * ldb : l + j * ldb);
            }
            const int64_t at = i + j * ldc;
            sum = times * sum + (plus == 0.0f ? 0.0f : plus * get(c, c_type, at));
            if (c_type == kFloat) static_cast<float*>(c)[at] = sum;
            else if (c_type == kHalf) static_cast<__half*>(c)[at] = __float2half_rn(sum);
            else static_cast<__nv_bfloat16*>(c)[at] = __float2bfloat16_rn(sum);
        }
    }
    return 0;
}
