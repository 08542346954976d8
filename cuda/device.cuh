// All that the kernels know of the platform. nvcc compiles the sources for a GPU; g++ with -DMFUSER_ON_CPU compiles
// the same sources against tests/cuda_on_cpu/cuda_on_cpu.h, which runs each grid on the CPU.
//
//   bf16, fp16                     storage types
//   to_float(x), from_float<T>(x)  float, bf16, fp16 <-> float, to nearest even
//   exp2_fast(x), rcp_fast(x)      one instruction on the GPU, about 2 and 1 units in the last place; denormals become 0
//   copy_async<BYTES>(to, from)    starts a copy of 4, 8 or 16 bytes from global to shared memory; after copies_done() this
//                                  thread sees all that it started
//   MFUSER_SHARED(name)            declares `unsigned char* name`: the block's dynamic shared memory, aligned to 16 bytes
//   MFUSER_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//                                  launches and returns a cudaError_t; `(kernel<...>)` in parentheses; more than 48 KB of
//                                  shared memory is asked for
//   MFUSER_LAUNCH_NEXT(...)        the same for a kernel that calls after_launch_before() ahead of reading what the launch
//                                  before it on this stream writes: on compute capability 9 its blocks start while that
//                                  one ends, once all blocks there have called next_may_start()
//   MFUSER_EXPORT(name, Params)    stands before the definition of `extern "C" int name(const Params*, void* stream)`:
//                                  makes it visible and adds name_size(), by which Python checks its copy of the struct
//
// Ordinary CUDA names work on both sides: see the list at the head of cuda_on_cpu.h for what the CPU knows of them.
#pragma once

#ifdef MFUSER_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

using bf16 = __nv_bfloat16;
using fp16 = __half;

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__host__ __device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float x);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__host__ __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__host__ __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

#ifdef MFUSER_ON_CPU

#ifndef MFUSER_CPU_EXP2  // a test's model of the GPU's unit
#define MFUSER_CPU_EXP2(x) exp2f(x)
#endif
__device__ __forceinline__ float exp2_fast(float x) { return MFUSER_CPU_EXP2(x); }
__device__ __forceinline__ float rcp_fast(float x) { return 1.0f / x; }

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    memcpy(to, from, BYTES);
}
__device__ __forceinline__ void copies_done() {}
__device__ __forceinline__ void after_launch_before() {}
__device__ __forceinline__ void next_may_start() {}

#define MFUSER_SHARED(name) unsigned char* const name = on_cpu::dynamic_shared()
#define MFUSER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    on_cpu::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define MFUSER_LAUNCH_NEXT(kernel, ...) MFUSER_LAUNCH(kernel, __VA_ARGS__)
#define MFUSER_DEVICE_TYPE "cpu"

#else

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void after_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

namespace mfuser {

template <typename T>
struct Same {
    using type = T;
};

// whether the current device can start a kernel before the one ahead of it has ended
inline bool can_overlap() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// cudaLaunchKernelEx returns this launch's own error; <<<>>> would leave it in a state that other calls share
template <typename... P>
cudaError_t launch(bool next, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   typename Same<P>::type... args) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
        cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    void* pointers[] = {&args..., nullptr};
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap, config.numAttrs = next && can_overlap() ? 1 : 0;
    return cudaLaunchKernelExC(&config, function, pointers);
}

}  // namespace mfuser

#define MFUSER_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define MFUSER_LAUNCH(kernel, ...) mfuser::launch(false, kernel, __VA_ARGS__)
#define MFUSER_LAUNCH_NEXT(kernel, ...) mfuser::launch(true, kernel, __VA_ARGS__)
#define MFUSER_DEVICE_TYPE "cuda"

#endif

#define MFUSER_VISIBLE __attribute__((visibility("default")))
#define MFUSER_EXPORT(name, Params)                                                          \
    extern "C" MFUSER_VISIBLE int name##_size() { return static_cast<int>(sizeof(Params)); } \
    extern "C" MFUSER_VISIBLE int name(const Params* params, void* stream)

// weak, and so once in the library however many sources include this
extern "C" MFUSER_VISIBLE __attribute__((used)) inline const char* mfuser_device_type() { return MFUSER_DEVICE_TYPE; }
// The library has a CUDA runtime of its own, whose current device torch does not set. The first call also shows whether
// the driver is recent enough for that runtime.
extern "C" MFUSER_VISIBLE __attribute__((used)) inline int mfuser_use_device(int index) {
    return static_cast<int>(cudaSetDevice(index));
}
extern "C" MFUSER_VISIBLE __attribute__((used)) inline const char* mfuser_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
