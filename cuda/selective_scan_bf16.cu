#include "selective_scan.cuh"

MFUSER_EXPORT(mfuser_selective_scan_fwd_bf16, ScanParams) { return forward_any<bf16>(*params, stream); }
MFUSER_EXPORT(mfuser_selective_scan_bwd_bf16, ScanParams) { return backward_any<bf16>(*params, stream); }
