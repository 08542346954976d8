// MVFuser's convolutions of three taps along the tokens with SiLU, forward and backward. Activations are of one type T, weights and
// sums fp32.
#include "mvfuser_parts.cuh"

namespace {

// Tuning; the caller chooses the tokens of a block.
// Groups: threads of a block that walk side by side. Ahead: rows that a thread asks for before it uses the first.
constexpr int kForwardBytes = 16, kForwardGroups = 4, kForwardAhead = 4;   // bytes of a load
constexpr int kBackwardVector = 4, kBackwardGroups = 4, kBackwardAhead = 2;  // elements of a load

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
