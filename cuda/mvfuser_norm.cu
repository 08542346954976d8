// MVFuser's token-wise norm and gate, forward and backward. Activations are of one type T, weights and sums fp32.
#include "mvfuser_parts.cuh"

namespace {

// Tuning; the caller chooses the blocks of the backward.
constexpr int kNormBytes = 16, kNormChunks = 2, kNormWarps = 8;  // chunks: loads of a row in registers at a time

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
