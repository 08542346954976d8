// What MVFuser does between its matrix products, forward and backward: token-wise norm and gate, convolutions of three
// taps along the tokens, and the small change (casts before, sums after). Activations are of one type T, parameters and
// sums fp32. M = B L tokens, h channels in either half.
#include "device.cuh"
#include "mvfuser.h"

namespace {

// Tuning; the caller chooses the tokens of a convolution's block and the blocks of the norm's backward.
// Groups: threads of a block that walk side by side. Ahead: rows that a thread asks for before it uses the first.
constexpr int kForwardBytes = 16, kForwardGroups = 4, kForwardAhead = 4;   // bytes of a load
constexpr int kBackwardVector = 4, kBackwardGroups = 4, kBackwardAhead = 2;  // elements of a load
constexpr int kNormBytes = 16, kNormChunks = 2, kNormWarps = 8;            // chunks: loads of a row in registers at a time
constexpr int kCastThreads = 256, kCastRepeat = 2;
constexpr int kSumColumns = 32, kSumGroups = 16;

// V neighbours in memory, aligned to the largest power of 2 that divides their size, and at most to 16 bytes
template <typename T, int V, size_t kBytes = sizeof(T) * V>
struct alignas(kBytes % 16 == 0 ? 16 : kBytes & (~kBytes + 1)) Pack {
    T item[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_if(bool inside, const T* from) {
    if (inside) return load<T, V>(from);
    Pack<T, V> zeros;
#pragma unroll
    for (int i = 0; i < V; ++i) zeros.item[i] = from_float<T>(0.0f);
    return zeros;
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
    if constexpr (sizeof pack == 16 && sizeof(T) == 2) {
        uint4 words;
        memcpy(&words, &pack, 16);
#ifdef MFUSER_ON_CPU
        *reinterpret_cast<uint4*>(to) = words;
#else
        __stwb(reinterpret_cast<uint4*>(to), words);  // an assignment becomes stores of 2 and 4 bytes in norm_backward
#endif
    } else {
        *reinterpret_cast<Pack<T, V>*>(to) = pack;
    }
}

__device__ __forceinline__ float sigmoid(float x) { return rcp_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    return x;
}

long long quotient_up(long long a, long long b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<size_t>(pointer) % bytes == 0; }

template <int V>
struct Width {
    static constexpr int value = V;
};

// calls launch(T{}) for the type's number: fp32, bf16, fp16
template <typename Launch>
int with_type(int type, Launch launch) {
    switch (type) {
        case 0: return launch(float{});
        case 1: return launch(bf16{});
        case 2: return launch(fp16{});
    }
    return cudaErrorInvalidValue;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------- casts

namespace {

template <typename S, typename T, int V>
__device__ __forceinline__ void cast_block(const MvfuserCastPiece& p, long long block) {
    const S* source = static_cast<const S*>(p.source);
    T* target = static_cast<T*>(p.target);
    const long long width = p.columns / V, count = p.rows * width;
    Pack<S, V> in[kCastRepeat];
    long long to[kCastRepeat];
#pragma unroll
    for (int r = 0; r < kCastRepeat; ++r) {
        const long long i = (block * kCastRepeat + r) * kCastThreads + threadIdx.x;
        const long long row = p.rows == 1 ? 0 : i / width, column = (i - row * width) * V;
        to[r] = i < count ? row * p.target_stride + column : -1;
        in[r] = load_if<S, V>(i < count, source + row * p.source_stride + column);
    }
#pragma unroll
    for (int r = 0; r < kCastRepeat; ++r) {
        if (to[r] < 0) continue;
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float value = to_float(in[r].item[i]);
            out.item[i] = from_float<T>(p.factor * (p.exponential ? expf(value) : value));
        }
        store(target + to[r], out);
    }
}

template <typename S, typename T>
__device__ __forceinline__ void cast_piece(const MvfuserCastPiece& p, long long block) {
    p.vectors ? cast_block<S, T, 8>(p, block) : cast_block<S, T, 1>(p, block);
}

// T is the one type besides fp32
template <typename T>
__global__ void __launch_bounds__(kCastThreads) cast(const __grid_constant__ MvfuserCastParams params) {
    after_launch_before();
    int i = 0;
    while (blockIdx.x >= params.piece[i].blocks) ++i;
    const MvfuserCastPiece& p = params.piece[i];
    const long long block = blockIdx.x - (i ? params.piece[i - 1].blocks : 0);
    if (p.source_type == 0) {
        p.target_type == 0 ? cast_piece<float, float>(p, block) : cast_piece<float, T>(p, block);
    } else {
        p.target_type == 0 ? cast_piece<T, float>(p, block) : cast_piece<T, T>(p, block);
    }
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_cast, MvfuserCastParams);

extern "C" int mfuser_mvfuser_cast(const MvfuserCastParams* given, void* stream) {
    MvfuserCastParams params = *given;
    long long blocks = 0;
    int type = 0;
    for (int i = 0; i < params.pieces; ++i) {
        MvfuserCastPiece& p = params.piece[i];
        const bool strides = p.rows == 1 || (p.source_stride % 8 == 0 && p.target_stride % 8 == 0);
        p.vectors = strides && p.columns % 8 == 0 && aligned(p.source, 16) && aligned(p.target, 16);
        p.blocks = blocks += quotient_up(p.rows * p.columns / (p.vectors ? 8 : 1), kCastThreads * kCastRepeat);
        for (int other : {p.source_type, p.target_type}) {
            if (other && type && other != type) return cudaErrorInvalidValue;
            if (other) type = other;
        }
    }
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto t) {
        return MFUSER_LAUNCH_NEXT((cast<decltype(t)>), static_cast<unsigned>(blocks), kCastThreads, 0, stream, params);
    });
}

// --------------------------------------------------------------------------------------------------------- convolutions

namespace {

// where a thread works: channels c.. of all 2h, tokens first..last of an image
template <int V, int kGroups>
struct Place {
    int c, first, last;
    long long image, row;  // row: of `partial`
    bool second, inside;

    __device__ __forceinline__ Place(const MvfuserConvParams& p) {
        const int panels = (2 * p.half / V + 31) / 32;
        row = blockIdx.x / panels;
        c = ((blockIdx.x % panels) * 32 + threadIdx.x) * V;
        const int chunks = (p.length - 1) / p.block_tokens + 1, walk = (p.block_tokens - 1) / kGroups + 1;
        image = row / chunks;
        const int start = static_cast<int>(row % chunks) * p.block_tokens;
        first = start + static_cast<int>(threadIdx.y) * walk;
        last = min(first + walk, min(start + p.block_tokens, p.length));
        second = c >= p.half;
        inside = c < 2 * p.half;
    }
    // of a half's (B, L, h)
    __device__ __forceinline__ long long offset(const MvfuserConvParams& p, int token) const {
        return (image * p.length + token) * p.half + (second ? c - p.half : c);
    }
};

template <int V>
__device__ __forceinline__ void load_taps(float (&w)[3][V], const MvfuserConvParams& p, int c) {
    const auto taps = load<float, 3 * V>(c < p.half ? p.wx + 3 * c : p.wz + 3 * (c - p.half));
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
        for (int k = 0; k < 3; ++k) w[k][i] = taps.item[3 * i + k];
    }
}

template <typename T, int V>
__device__ __forceinline__ void widen(float (&to)[V], const Pack<T, V>& from) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(from.item[i]);
}

template <int V>
__device__ __forceinline__ void shift(float (&before)[V], float (&here)[V], const float (&after)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) before[i] = here[i], here[i] = after[i];
}

// x = silu(conv(xz[..., :h])), z = silu(conv(xz[..., h:])), each row of xz read once (and twice at a thread's edges)
template <typename T, int V>
__global__ void __launch_bounds__(32 * kForwardGroups) conv_forward(const __grid_constant__ MvfuserConvParams p) {
    after_launch_before();
    const Place<V, kForwardGroups> place(p);
    if (!place.inside || place.first >= place.last) return;
    const T* in = static_cast<const T*>(p.xz) + place.image * p.batch_stride + place.c;
    T* out = static_cast<T*>(place.second ? p.z : p.x) + place.offset(p, place.first);
    const bool silu = p.gate || !place.second;
    float w[3][V], before[V], here[V], after[V];
    load_taps(w, p, place.c);
    widen(before, load_if<T, V>(place.first > 0, in + (place.first - 1LL) * p.token_stride));
    widen(here, load<T, V>(in + place.first * p.token_stride));
    for (int t = place.first; t < place.last; t += kForwardAhead) {
        Pack<T, V> rows[kForwardAhead];
#pragma unroll
        for (int j = 0; j < kForwardAhead; ++j) {
            const int next = t + 1 + j;
            rows[j] = load_if<T, V>(next <= place.last && next < p.length, in + next * p.token_stride);
        }
#pragma unroll
        for (int j = 0; j < kForwardAhead; ++j) {
            if (t + j >= place.last) break;
            widen(after, rows[j]);
            Pack<T, V> result;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float sum = fmaf(w[2][i], after[i], fmaf(w[1][i], here[i], w[0][i] * before[i]));
                result.item[i] = from_float<T>(silu ? sum * sigmoid(sum) : sum);
            }
            store(out, result);
            out += p.half;
            shift(before, here, after);
        }
    }
}

// With a = conv(xz) computed again and da = d silu'(a):
//   dxz[t] = w0 da[t+1] + w1 da[t] + w2 da[t-1],    dw_k = sum_t da[t] xz[t+k-1]
template <typename T, int V>
__global__ void __launch_bounds__(32 * kBackwardGroups) conv_backward(const __grid_constant__ MvfuserConvParams p) {
    after_launch_before();
    const Place<V, kBackwardGroups> place(p);
    float dw[3][V] = {};
    if (place.inside && place.first < place.last) {
        const T* in = static_cast<const T*>(p.xz) + place.image * p.batch_stride + place.c;
        T* out = static_cast<T*>(p.dxz) + (place.image * p.length + place.first) * 2 * p.half + place.c;
        const T* d = static_cast<const T*>(place.second ? p.dz : p.du) + place.offset(p, 0);
        const T* more = static_cast<const T*>(p.dx) + place.offset(p, 0);
        const bool silu = p.gate || !place.second;
        float w[3][V], before[V], here[V], after[V], da_before[V] = {}, da_here[V] = {};
        load_taps(w, p, place.c);
        // da of one token before the first and one behind the last is needed, too
        widen(before, load_if<T, V>(place.first > 1, in + (place.first - 2LL) * p.token_stride));
        widen(here, load_if<T, V>(place.first > 0, in + (place.first - 1LL) * p.token_stride));
        for (int t = place.first - 1; t <= place.last; t += kBackwardAhead) {
            Pack<T, V> rows[kBackwardAhead], one[kBackwardAhead], two[kBackwardAhead];
#pragma unroll
            for (int j = 0; j < kBackwardAhead; ++j) {
                const int now = t + j, next = now + 1;
                const bool used = now >= 0 && now < p.length && now <= place.last;
                rows[j] = load_if<T, V>(next <= place.last + 1 && next < p.length, in + next * p.token_stride);
                one[j] = load_if<T, V>(used, d + static_cast<long long>(now) * p.half);
                two[j] = load_if<T, V>(used && !place.second, more + static_cast<long long>(now) * p.half);
            }
#pragma unroll
            for (int j = 0; j < kBackwardAhead; ++j) {
                const int now = t + j;
                if (now > place.last) break;
                widen(after, rows[j]);
                const bool own = now >= place.first && now < place.last;
                Pack<T, V> result;
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float sum = fmaf(w[2][i], after[i], fmaf(w[1][i], here[i], w[0][i] * before[i]));
                    const float share = sigmoid(sum);
                    // 0 outside the sequence, where d is
                    float da = to_float(one[j].item[i]) + to_float(two[j].item[i]);
                    if (silu) da *= share * fmaf(sum, 1.0f - share, 1.0f);
                    if (own) {
                        dw[0][i] = fmaf(da, before[i], dw[0][i]);
                        dw[1][i] = fmaf(da, here[i], dw[1][i]);
                        dw[2][i] = fmaf(da, after[i], dw[2][i]);
                    }
                    result.item[i] = from_float<T>(fmaf(w[0][i], da, fmaf(w[1][i], da_here[i], w[2][i] * da_before[i])));
                    da_before[i] = da_here[i], da_here[i] = da;
                }
                if (now > place.first) {
                    store(out, result);
                    out += 2 * p.half;
                }
                shift(before, here, after);
            }
        }
    }
    MFUSER_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);  // (groups - 1, 3 V, 32)
    if (threadIdx.y > 0) {
#pragma unroll
        for (int i = 0; i < 3 * V; ++i) shared[((threadIdx.y - 1) * 3 * V + i) * 32 + threadIdx.x] = dw[i % 3][i / 3];
    }
    __syncthreads();
    if (threadIdx.y > 0 || !place.inside) return;
    Pack<float, 3 * V> sums;
#pragma unroll
    for (int i = 0; i < 3 * V; ++i) {
        sums.item[i] = dw[i % 3][i / 3];
        for (int g = 0; g < kBackwardGroups - 1; ++g) sums.item[i] += shared[(g * 3 * V + i) * 32 + threadIdx.x];
    }
    store(p.partial + (place.row * 2 * p.half + place.c) * 3, sums);
}

// both convolutions' launch: `launch(width, grid)` with vectors where all is aligned to them
template <typename T, int V, typename Launch>
int conv_launch(const MvfuserConvParams& p, Launch launch) {
    bool fits = p.half % V == 0 && p.batch_stride % V == 0 && p.token_stride % V == 0;
    for (const void* pointer : {p.xz, static_cast<const void*>(p.x), static_cast<const void*>(p.z), p.du, p.dx, p.dz,
                                static_cast<const void*>(p.dxz)}) {
        fits = fits && aligned(pointer, V * sizeof(T));
    }
    fits = fits && aligned(p.wx, 16) && aligned(p.wz, 16);
    const long long panels = quotient_up(2 * p.half / (fits ? V : 1), 32);
    const long long blocks = panels * quotient_up(p.length, p.block_tokens) * p.batch;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    const unsigned grid = static_cast<unsigned>(blocks);
    return fits ? launch(Width<V>{}, grid) : launch(Width<1>{}, grid);
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_conv_fwd, MvfuserConvParams);

extern "C" int mfuser_mvfuser_conv_fwd(const MvfuserConvParams* p, void* stream) {
    return with_type(p->type, [&](auto t) {
        using T = decltype(t);
        return conv_launch<T, kForwardBytes / sizeof(T)>(*p, [&](auto width, unsigned grid) {
            constexpr int V = decltype(width)::value;
            return MFUSER_LAUNCH_NEXT((conv_forward<T, V>), grid, dim3(32, kForwardGroups), 0, stream, *p);
        });
    });
}

MFUSER_EXPORT(mfuser_mvfuser_conv_bwd, MvfuserConvParams);

extern "C" int mfuser_mvfuser_conv_bwd(const MvfuserConvParams* p, void* stream) {
    return with_type(p->type, [&](auto t) {
        using T = decltype(t);
        return conv_launch<T, kBackwardVector>(*p, [&](auto width, unsigned grid) {
            constexpr int V = decltype(width)::value;
            const size_t shared = (kBackwardGroups - 1) * 3 * V * 32 * sizeof(float);
            return MFUSER_LAUNCH_NEXT((conv_backward<T, V>), grid, dim3(32, kBackwardGroups), shared, stream, *p);
        });
    });
}

// ------------------------------------------------------------------------------------------------------- norm and gate

namespace {

template <typename T, int V>
__device__ __forceinline__ void load_row(Pack<T, V> (&to)[kNormChunks], const T* row, int panel, int half) {
#pragma unroll
    for (int k = 0; k < kNormChunks; ++k) {
        const int c = ((panel * kNormChunks + k) * 32 + threadIdx.x) * V;
        to[k] = load_if<T, V>(c < half, row + c);
    }
}

// g = scale n w silu(z) with n = y / rms(y), one warp a token. The scale of the whole block is applied here, in fp32, so
// that the last matrix product gives the block's result.
template <typename T, int V>
__global__ void __launch_bounds__(32 * kNormWarps) norm_forward(const __grid_constant__ MvfuserNormParams p) {
    after_launch_before();
    const long long token = static_cast<long long>(blockIdx.x) * kNormWarps + threadIdx.y;
    if (token >= p.tokens) return;
    const T *y_row = static_cast<const T*>(p.y) + token * p.half, *z_row = static_cast<const T*>(p.z) + token * p.half;
    T* g_row = static_cast<T*>(p.g) + token * p.half;
    const int panels = (p.half - 1) / (32 * V * kNormChunks) + 1;
    Pack<T, V> y[kNormChunks], z[kNormChunks];
    float squares = 0.0f;
    for (int panel = 0; panel < panels; ++panel) {
        load_row<T, V>(y, y_row, panel, p.half);
        load_row<T, V>(z, z_row, panel, p.half);
#pragma unroll
        for (int k = 0; k < kNormChunks; ++k) {
#pragma unroll
            for (int i = 0; i < V; ++i) squares = fmaf(to_float(y[k].item[i]), to_float(y[k].item[i]), squares);
        }
    }
    const float root = rsqrtf(sum_of_warp(squares) / p.half + p.eps), scale = *p.scale;
    for (int panel = 0; panel < panels; ++panel) {
        if (panels > 1) {
            load_row<T, V>(y, y_row, panel, p.half);
            load_row<T, V>(z, z_row, panel, p.half);
        }
#pragma unroll
        for (int k = 0; k < kNormChunks; ++k) {
            const int c = ((panel * kNormChunks + k) * 32 + threadIdx.x) * V;
            if (c >= p.half) continue;
            const auto weight = load<float, V>(p.weight + c);
            Pack<T, V> g;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float gate = to_float(z[k].item[i]), normed = to_float(y[k].item[i]) * root * weight.item[i];
                g.item[i] = from_float<T>(scale * (normed * (gate * sigmoid(gate))));
            }
            store(g_row + c, g);
        }
    }
}

// With q = silu(z), v = n w, g = s v q and d = dout @ W_out, which lacks the factor s:
//   ds = sum d v q    dz = s d v silu'(z)    dw = sum_t s d q n    dy = (e - n mean(e n)) / rms(y) with e = s d q w
// g is written again for the gradient of W_out. Each warp takes every so many-th token; what it sums over tokens is kept
// in its own row of shared memory.
template <typename T, int V>
__global__ void __launch_bounds__(32 * kNormWarps, 2) norm_backward(const __grid_constant__ MvfuserNormParams p) {
    after_launch_before();
    MFUSER_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);  // (warps, padded) and a number for each warp
    const int padded = (p.half + 3) / 4 * 4, warps = blockDim.y;
    float *own = sums + threadIdx.y * padded, *dscales = sums + warps * padded;
    for (int c = threadIdx.x; c < p.half; c += 32) own[c] = 0.0f;
    __syncwarp();
    const int panels = (p.half - 1) / (32 * V * kNormChunks) + 1;
    const float scale = *p.scale;
    float dscale = 0.0f;
    for (long long token = static_cast<long long>(blockIdx.x) * warps + threadIdx.y; token < p.tokens;
         token += static_cast<long long>(gridDim.x) * warps) {
        const long long row = token * p.half;
        const T *y_row = static_cast<const T*>(p.y) + row, *z_row = static_cast<const T*>(p.z) + row;
        const T* d_row = static_cast<const T*>(p.dg) + row;
        Pack<T, V> y[kNormChunks], z[kNormChunks], d[kNormChunks];
        float squares = 0.0f, along = 0.0f;
        for (int panel = 0; panel < panels; ++panel) {
            load_row<T, V>(y, y_row, panel, p.half);
            load_row<T, V>(z, z_row, panel, p.half);
            load_row<T, V>(d, d_row, panel, p.half);
#pragma unroll
            for (int k = 0; k < kNormChunks; ++k) {
                const int c = ((panel * kNormChunks + k) * 32 + threadIdx.x) * V;
                const auto weight = load_if<float, V>(c < p.half, p.weight + c);
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float value = to_float(y[k].item[i]), gate = to_float(z[k].item[i]);
                    squares = fmaf(value, value, squares);
                    along = fmaf(to_float(d[k].item[i]) * (gate * sigmoid(gate)), weight.item[i] * value, along);
                }
            }
        }
        const float root = rsqrtf(sum_of_warp(squares) / p.half + p.eps);
        // dscale's share is along / rms; e is scale times what `along` sums
        const float total = sum_of_warp(along);
        dscale = fmaf(total, root, dscale);
        const float slope = scale * total * root * root / p.half;
        for (int panel = 0; panel < panels; ++panel) {
            if (panels > 1) {
                load_row<T, V>(y, y_row, panel, p.half);
                load_row<T, V>(z, z_row, panel, p.half);
                load_row<T, V>(d, d_row, panel, p.half);
            }
#pragma unroll
            for (int k = 0; k < kNormChunks; ++k) {
                const int c = ((panel * kNormChunks + k) * 32 + threadIdx.x) * V;
                if (c >= p.half) continue;
                const auto weight = load<float, V>(p.weight + c);
                auto dweight = load<float, V>(own + c);
                Pack<T, V> g, dy, dz;
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float value = to_float(y[k].item[i]), gate = to_float(z[k].item[i]);
                    const float share = sigmoid(gate), silu = gate * share, normed = value * root * weight.item[i];
                    const float ds = scale * to_float(d[k].item[i]), e = ds * silu;
                    g.item[i] = from_float<T>(scale * (normed * silu));
                    dz.item[i] = from_float<T>(ds * normed * (share * fmaf(gate, 1.0f - share, 1.0f)));
                    dy.item[i] = from_float<T>(root * fmaf(e, weight.item[i], -value * slope));
                    dweight.item[i] = fmaf(e, value * root, dweight.item[i]);
                }
                store(static_cast<T*>(p.g) + row + c, g);
                store(static_cast<T*>(p.dy) + row + c, dy);
                store(static_cast<T*>(p.dz) + row + c, dz);
                store(own + c, dweight);
            }
        }
    }
    if (threadIdx.x == 0) dscales[threadIdx.y] = dscale;
    __syncthreads();
    float* partial = p.partial + static_cast<long long>(blockIdx.x) * (p.half + 1);
    for (int c = threadIdx.y * 32 + threadIdx.x; c <= p.half; c += 32 * warps) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += c < p.half ? sums[w * padded + c] : dscales[w];
        partial[c] = sum;
    }
}

template <typename T, typename Launch>
int norm_launch(const MvfuserNormParams& p, Launch launch) {
    constexpr int V = kNormBytes / sizeof(T);
    bool fits = p.half % V == 0 && aligned(p.weight, 16);
    for (const void* pointer : {p.y, p.z, static_cast<const void*>(p.g), p.dg, static_cast<const void*>(p.dy),
                                static_cast<const void*>(p.dz)}) {
        fits = fits && aligned(pointer, kNormBytes);
    }
    return fits ? launch(Width<V>{}) : launch(Width<1>{});
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_norm_fwd, MvfuserNormParams);

extern "C" int mfuser_mvfuser_norm_fwd(const MvfuserNormParams* p, void* stream) {
    return with_type(p->type, [&](auto t) {
        using T = decltype(t);
        return norm_launch<T>(*p, [&](auto width) {
            constexpr int V = decltype(width)::value;
            const long long blocks = quotient_up(p->tokens, kNormWarps);
            if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
            return MFUSER_LAUNCH_NEXT((norm_forward<T, V>), static_cast<unsigned>(blocks), dim3(32, kNormWarps), 0, stream, *p);
        });
    });
}

MFUSER_EXPORT(mfuser_mvfuser_norm_bwd, MvfuserNormParams);

extern "C" int mfuser_mvfuser_norm_bwd(const MvfuserNormParams* p, void* stream) {
    const size_t row = (p->half + 3) / 4 * 4 * sizeof(float);
    int warps = kNormWarps;
    while (warps > 1 && warps * row > 48 * 1024) warps /= 2;
    const size_t shared = warps * (row + sizeof(float));
    return with_type(p->type, [&](auto t) {
        using T = decltype(t);
        return norm_launch<T>(*p, [&](auto width) {
            constexpr int V = decltype(width)::value;
            return MFUSER_LAUNCH_NEXT((norm_backward<T, V>), p->blocks, dim3(32, warps), shared, stream, *p);
        });
    });
}

// ---------------------------------------------------------------------------------------------------------------- sums

namespace {

// target[c] = factor * times[c] * sum over rows of source[:, c], always in the same order
__global__ void __launch_bounds__(kSumColumns * kSumGroups) sum_rows(const __grid_constant__ MvfuserSumParams params) {
    after_launch_before();
    __shared__ float shared[kSumGroups][kSumColumns];
    int i = 0;
    while (static_cast<int>(blockIdx.x) >= params.piece[i].blocks) ++i;
    const MvfuserSumPiece& p = params.piece[i];
    const int c = (blockIdx.x - (i ? params.piece[i - 1].blocks : 0)) * kSumColumns + threadIdx.x;
    float sum = 0.0f;
    if (c < p.columns) {
#pragma unroll 4
        for (int r = threadIdx.y; r < p.rows; r += kSumGroups) sum += p.source[r * p.stride + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= p.columns) return;
    for (int g = 1; g < kSumGroups; ++g) sum += shared[g][threadIdx.x];
    p.target[c] = p.factor * sum * (p.times ? p.times[c] : 1.0f);
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_sum, MvfuserSumParams);

extern "C" int mfuser_mvfuser_sum(const MvfuserSumParams* given, void* stream) {
    MvfuserSumParams params = *given;
    int blocks = 0;
    for (int i = 0; i < params.pieces; ++i) {
        params.piece[i].blocks = blocks += (params.piece[i].columns - 1) / kSumColumns + 1;
    }
    return MFUSER_LAUNCH_NEXT(sum_rows, blocks, dim3(kSumColumns, kSumGroups), 0, stream, params);
}
