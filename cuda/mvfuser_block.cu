// MVFuser's block in one call for each direction: the launches in their order. The matrix products are cuBLAS's, whose
// function and handle the caller hands over; the scan and all that lies between are the launchers of the other sources.
//
// All matrices are row by row. What the backward takes again lies in one buffer of the caller's (`kept`), what only one
// direction needs in another (`scratch`); where each piece lies in them, the caller says, too.
#include "mvfuser.h"
#include "selective_scan.h"

enum { kTokens, kIn, kX, kDt, kOut, kOperands };  // what the products take: tokens and the four projections

struct MvfuserBlockKept {  // in bytes; T is the type of the activations
    long long operand[kOperands];            // in T, where they are given in another type
    long long A, bias;                       // -exp(A_log) (h, N), times * dt_bias (h,): fp32
    long long xz, x, z, joined, delta, y;    // (M, 2h), (M, h) twice, see `joined_columns`, (M, h) twice
    long long saved;                         // the scan's, or -1: nothing is kept for a backward
};

struct MvfuserBlockScratch {  // in bytes
    long long g, state;                 // (M, h), which the last projection takes; the scan's last state
    long long dg, dy, dz, du, ddelta;   // (M, h), but for dy, which has room for dxz (M, 2h)
    long long dB, dC, djoined;          // (M, N) twice, as `joined`
    long long dA, dbias, conv, norm;    // fp32: the scan's gradients, what adds up to those of convolutions and norm
};

// the same for all calls of a shape
struct MvfuserBlockShape {
    int batch, length, width, half, rank, state;
    int gate;        // whether z passes SiLU before the norm's gate, too
    float times;     // how often the steps' bias counts
    float eps;
    int type, operand_type[kOperands];  // the latter is T's or fp32's
    int forward_tokens, backward_tokens, norm_blocks;  // as in mvfuser.h
    MvfuserBlockKept kept;
    MvfuserBlockScratch scratch;
};

struct MvfuserBlockParams {
    const void* operand[kOperands];  // (M, C), (2h, C), (R + 2N, h), (h, R), (C, h)
    const float *conv_x, *conv_z, *dt_bias, *A_log, *D, *norm, *scale;
    char *kept, *scratch;
    void* out;                      // forward: (M, C) in T
    const void* dout;               // backward: (M, C) in T
    void* gradient[kOperands];      // of the operands; null: not wanted
    float *dconv_x, *dconv_z, *ddt_bias, *dA_log, *dD, *dnorm, *dscale;
    void *gemm, *handle;            // cublasGemmEx and its handle, on whose stream all runs
    int compute;                    // cublasComputeType_t
    MvfuserBlockShape shape;
    ScanParams scan;                // sizes, and its scratch
};

extern "C" int mfuser_selective_scan_fwd_fp32(const ScanParams*, void* stream);
extern "C" int mfuser_selective_scan_fwd_bf16(const ScanParams*, void* stream);
extern "C" int mfuser_selective_scan_fwd_fp16(const ScanParams*, void* stream);
extern "C" int mfuser_selective_scan_bwd_fp32(const ScanParams*, void* stream);
extern "C" int mfuser_selective_scan_bwd_bf16(const ScanParams*, void* stream);
extern "C" int mfuser_selective_scan_bwd_fp16(const ScanParams*, void* stream);

namespace {

// cublasGemmEx of cublas_api.h, which is not needed to compile; its operations and types are numbers
using Gemm = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
                     int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                     int compute, int algorithm);
constexpr int kCublasTypes[] = {0, 14, 2};  // CUDA_R_32F, CUDA_R_16BF, CUDA_R_16F
constexpr int kCublasDefault = -1;          // CUBLAS_GEMM_DEFAULT

constexpr int (*kScanForward[])(const ScanParams*, void*) = {
    mfuser_selective_scan_fwd_fp32, mfuser_selective_scan_fwd_bf16, mfuser_selective_scan_fwd_fp16};
constexpr int (*kScanBackward[])(const ScanParams*, void*) = {
    mfuser_selective_scan_bwd_fp32, mfuser_selective_scan_bwd_bf16, mfuser_selective_scan_bwd_fp16};

#define MFUSER_TRY(call) \
    if (const int error = (call)) return error

struct Matrix {
    const void* data;
    long long stride;  // of rows, in elements
    bool transposed = false;

    Matrix t() const { return {data, stride, !transposed}; }
};

// columns of `joined` and the rows of x_proj that they come from
struct Columns {
    int first, row, count;
};

// The block's sizes and memory, by name.
class Block {
public:
    Block(const MvfuserBlockParams& params, void* stream)
        : p(params), s(params.shape), M(static_cast<long long>(s.batch) * s.length), stream(stream),
          bytes(s.type ? 2 : 4), padded_rank((s.rank + 3) / 4 * 4), joined_width(padded_rank + 2 * s.state) {}

    // what the kernels count in 31 bits, and the scan takes
    bool well_formed() const {
        return M <= 0x7FFFFFFF && s.half % 4 == 0 && s.state % 4 == 0 && s.type >= 0 && s.type < 3 && p.gemm;
    }

    template <typename T = void>
    T* kept(long long offset) const {
        return reinterpret_cast<T*>(p.kept + offset);
    }
    template <typename T = void>
    T* scratch(long long offset) const {
        return reinterpret_cast<T*>(p.scratch + offset);
    }

    // an operand of the products, in T
    Matrix operand(int i) const {
        const long long columns[] = {s.width, s.width, s.half, s.rank, s.half};
        return {s.operand_type[i] == s.type ? p.operand[i] : kept(s.kept.operand[i]), columns[i]};
    }

    Matrix rows(const void* data, long long columns) const { return {data, columns}; }

    const void* column(const void* data, long long index) const { return static_cast<const char*>(data) + index * bytes; }
    void* column(void* data, long long index) const { return static_cast<char*>(data) + index * bytes; }

    // `joined` is (M, R + 2N), with a gap behind the R columns where R is no multiple of 4: the scan loads by fours.
    // Returns how many pieces it has.
    int joined_columns(Columns (&columns)[2]) const {
        columns[0] = {0, 0, s.rank}, columns[1] = {padded_rank, s.rank, 2 * s.state};
        if (padded_rank > s.rank) return 2;
        columns[0].count += columns[1].count;
        return 1;
    }

    // out (m, n) = a (m, k) b (k, n), added to what is there if `add`. Column by column, as cuBLAS has its matrices, this is
    // out^T = b^T a^T.
    int product(Matrix a, Matrix b, long long m, long long n, long long k, void* out, long long stride, int type,
                bool add = false) const {
        const float one = 1.0f, beta = add ? 1.0f : 0.0f;
        const int from = kCublasTypes[s.type];
        return -reinterpret_cast<Gemm>(p.gemm)(
            p.handle, b.transposed, a.transposed, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one, b.data,
            from, static_cast<int>(b.stride), a.data, from, static_cast<int>(a.stride), &beta, out, kCublasTypes[type],
            static_cast<int>(stride), p.compute, kCublasDefault);
    }

    // the same for the gradient of an operand, in its type
    int gradient(int i, Matrix a, Matrix b, long long m, long long n, long long k) const {
        return p.gradient[i] ? product(a, b, m, n, k, p.gradient[i], n, s.operand_type[i]) : 0;
    }

    MvfuserConvParams conv() const {
        MvfuserConvParams c = {};
        c.xz = kept(s.kept.xz), c.wx = p.conv_x, c.wz = p.conv_z;
        c.batch_stride = 2LL * s.half * s.length, c.token_stride = 2LL * s.half;
        c.batch = s.batch, c.length = s.length, c.half = s.half, c.gate = s.gate, c.type = s.type;
        return c;
    }

    MvfuserNormParams norm() const {
        MvfuserNormParams n = {};
        n.y = kept(s.kept.y), n.z = kept(s.kept.z), n.weight = p.norm, n.scale = p.scale, n.g = scratch(s.scratch.g);
        n.tokens = M, n.half = s.half, n.blocks = s.norm_blocks, n.eps = s.eps, n.type = s.type;
        return n;
    }

    ScanParams scan() const {
        ScanParams scan = p.scan;
        void* joined = kept(s.kept.joined);
        scan.u = kept(s.kept.x), scan.delta = kept(s.kept.delta);
        scan.B = column(joined, padded_rank), scan.C = column(joined, padded_rank + s.state);
        scan.A = kept<float>(s.kept.A), scan.D = p.D, scan.bias = kept<float>(s.kept.bias);
        scan.saved = s.kept.saved < 0 ? nullptr : kept<float>(s.kept.saved);
        const int64_t image = static_cast<int64_t>(s.length) * s.half;
        scan.u_batch = scan.delta_batch = scan.dy_batch = image;
        scan.u_row = scan.delta_row = scan.dy_row = s.half * bytes;
        scan.B_batch = scan.C_batch = static_cast<int64_t>(s.length) * joined_width;
        scan.B_row = scan.C_row = joined_width * bytes;
        scan.softplus = 1;
        return scan;
    }

    const MvfuserBlockParams& p;
    const MvfuserBlockShape& s;
    const long long M;
    void* const stream;
    const int bytes, padded_rank, joined_width;
};

MvfuserCastPiece cast_piece(const void* source, int from, void* target, int to, long long count, float factor = 1.0f) {
    MvfuserCastPiece piece = {};
    piece.source = source, piece.target = target, piece.rows = 1, piece.columns = count, piece.factor = factor;
    piece.source_type = from, piece.target_type = to;
    return piece;
}

MvfuserSumPiece sum_piece(const float* source, float* target, int columns, int rows = 1, long long stride = 0,
                          float factor = 1.0f, const float* times = nullptr) {
    return {source, times, target, stride, rows, columns, factor, 0};
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_block_fwd, MvfuserBlockParams);

extern "C" int mfuser_mvfuser_block_fwd(const MvfuserBlockParams* params, void* stream) {
    const Block b(*params, stream);
    const MvfuserBlockParams& p = *params;
    const MvfuserBlockShape& s = p.shape;
    const long long M = b.M;
    if (!b.well_formed()) return cudaErrorInvalidValue;
    const auto& at = s.kept;

    MvfuserCastParams casts = {};
    const long long sizes[] = {M * s.width, 2LL * s.half * s.width, (s.rank + 2LL * s.state) * s.half,
                               static_cast<long long>(s.half) * s.rank, static_cast<long long>(s.width) * s.half};
    for (int i = 0; i < kOperands; ++i) {
        if (s.operand_type[i] == s.type) continue;
        casts.piece[casts.pieces++] = cast_piece(p.operand[i], s.operand_type[i], b.kept(at.operand[i]), s.type, sizes[i]);
    }
    casts.piece[casts.pieces] = cast_piece(p.A_log, 0, b.kept(at.A), 0, static_cast<long long>(s.half) * s.state, -1.0f);
    casts.piece[casts.pieces++].exponential = 1;
    casts.piece[casts.pieces++] = cast_piece(p.dt_bias, 0, b.kept(at.bias), 0, s.half, s.times);
    MFUSER_TRY(mfuser_mvfuser_cast(&casts, stream));

    MFUSER_TRY(b.product(b.operand(kTokens), b.operand(kIn).t(), M, 2 * s.half, s.width, b.kept(at.xz), 2 * s.half, s.type));

    MvfuserConvParams conv = b.conv();
    conv.x = b.kept(at.x), conv.z = b.kept(at.z), conv.block_tokens = s.forward_tokens;
    MFUSER_TRY(mfuser_mvfuser_conv_fwd(&conv, stream));

    const Matrix x = b.rows(b.kept(at.x), s.half), w_x = b.operand(kX);
    Columns columns[2];
    for (int i = 0, pieces = b.joined_columns(columns); i < pieces; ++i) {
        const Columns& c = columns[i];
        const Matrix w = {b.column(w_x.data, static_cast<long long>(c.row) * s.half), w_x.stride};
        MFUSER_TRY(b.product(x, w.t(), M, c.count, s.half, b.column(b.kept(at.joined), c.first), b.joined_width, s.type));
    }
    const Matrix ranks = b.rows(b.kept(at.joined), b.joined_width);
    MFUSER_TRY(b.product(ranks, b.operand(kDt).t(), M, s.half, s.rank, b.kept(at.delta), s.half, s.type));

    ScanParams scan = b.scan();
    scan.y = b.kept(at.y), scan.state = b.scratch<float>(s.scratch.state);
    MFUSER_TRY(kScanForward[s.type](&scan, stream));

    const MvfuserNormParams norm = b.norm();
    MFUSER_TRY(mfuser_mvfuser_norm_fwd(&norm, stream));
    return b.product(b.rows(norm.g, s.half), b.operand(kOut).t(), M, s.width, s.half, p.out, s.width, s.type);
}

MFUSER_EXPORT(mfuser_mvfuser_block_bwd, MvfuserBlockParams);

extern "C" int mfuser_mvfuser_block_bwd(const MvfuserBlockParams* params, void* stream) {
    const Block b(*params, stream);
    const MvfuserBlockParams& p = *params;
    const MvfuserBlockShape& s = p.shape;
    const long long M = b.M;
    if (!b.well_formed() || s.kept.saved < 0) return cudaErrorInvalidValue;
    const auto& at = s.kept;
    const auto& to = s.scratch;
    const int half = s.half;

    const Matrix dout = b.rows(p.dout, s.width);
    MFUSER_TRY(b.product(dout, b.operand(kOut), M, half, s.width, b.scratch(to.dg), half, s.type));
    MvfuserNormParams norm = b.norm();
    norm.dg = b.scratch(to.dg), norm.dy = b.scratch(to.dy), norm.dz = b.scratch(to.dz), norm.partial = b.scratch<float>(to.norm);
    MFUSER_TRY(mfuser_mvfuser_norm_bwd(&norm, stream));
    MFUSER_TRY(b.gradient(kOut, dout.t(), b.rows(norm.g, half), s.width, half, M));

    ScanParams scan = b.scan();
    scan.dy = norm.dy, scan.du = b.scratch(to.du), scan.ddelta = b.scratch(to.ddelta);
    scan.dB = b.scratch(to.dB), scan.dC = b.scratch(to.dC), scan.dA = b.scratch<float>(to.dA), scan.dD = p.dD;
    scan.dbias = b.scratch<float>(to.dbias);
    MFUSER_TRY(kScanBackward[s.type](&scan, stream));

    void* const djoined = b.scratch(to.djoined);
    const Matrix ddelta = b.rows(scan.ddelta, half), ranks = b.rows(b.kept(at.joined), b.joined_width);
    MFUSER_TRY(b.product(ddelta, b.operand(kDt), M, s.rank, half, djoined, b.joined_width, s.type));
    MFUSER_TRY(b.gradient(kDt, ddelta.t(), ranks, half, s.rank, M));
    MvfuserCastParams joins = {};
    for (const void* source : {scan.dB, scan.dC}) {
        void* target = b.column(djoined, b.padded_rank + joins.pieces * s.state);
        MvfuserCastPiece piece = cast_piece(source, s.type, target, s.type, s.state);
        piece.rows = M, piece.source_stride = s.state, piece.target_stride = b.joined_width;
        joins.piece[joins.pieces++] = piece;
    }
    MFUSER_TRY(mfuser_mvfuser_cast(&joins, stream));

    void* const dx = b.scratch(to.dg);  // which has been read
    const Matrix x = b.rows(b.kept(at.x), half), w_x = b.operand(kX);
    const long long type_bytes = s.operand_type[kX] ? 2 : 4;
    Columns columns[2];
    for (int i = 0, pieces = b.joined_columns(columns); i < pieces; ++i) {
        const Columns& c = columns[i];
        const Matrix d = b.rows(b.column(djoined, c.first), b.joined_width);
        const Matrix w = {b.column(w_x.data, static_cast<long long>(c.row) * half), w_x.stride};
        MFUSER_TRY(b.product(d, w, M, half, c.count, dx, half, s.type, i > 0));
        if (!p.gradient[kX]) continue;
        void* target = static_cast<char*>(p.gradient[kX]) + c.row * type_bytes * half;
        MFUSER_TRY(b.product(d.t(), x, c.count, half, M, target, half, s.operand_type[kX]));
    }

    MvfuserConvParams conv = b.conv();
    conv.du = scan.du, conv.dx = dx, conv.dz = norm.dz, conv.dxz = b.scratch(to.dy);  // dy and g have been read
    conv.partial = b.scratch<float>(to.conv), conv.block_tokens = s.backward_tokens;
    MFUSER_TRY(mfuser_mvfuser_conv_bwd(&conv, stream));
    const Matrix dxz = b.rows(conv.dxz, 2 * half);
    MFUSER_TRY(b.gradient(kIn, dxz.t(), b.operand(kTokens), 2 * half, s.width, M));
    MFUSER_TRY(b.gradient(kTokens, dxz, b.operand(kIn), M, s.width, 2 * half));

    const int rows = s.batch * ((s.length - 1) / s.backward_tokens + 1);
    MvfuserSumParams sums = {};
    for (const MvfuserSumPiece& piece : {
             sum_piece(conv.partial, p.dconv_x, 3 * half, rows, 6LL * half),
             sum_piece(conv.partial + 3 * half, p.dconv_z, 3 * half, rows, 6LL * half),
             sum_piece(norm.partial, p.dnorm, half, s.norm_blocks, half + 1),
             sum_piece(norm.partial + half, p.dscale, 1, s.norm_blocks, half + 1),
             sum_piece(scan.dA, p.dA_log, half * s.state, 1, 0, 1.0f, scan.A),
             sum_piece(scan.dbias, p.ddt_bias, half, 1, 0, s.times),
         }) {
        sums.piece[sums.pieces++] = piece;
    }
    return mfuser_mvfuser_sum(&sums, stream);
}
