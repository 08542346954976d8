#include "selective_scan.cuh"

MFUSER_EXPORT(mfuser_selective_scan_fwd_fp16, ScanParams) { return forward_any<fp16>(*params, stream); }
MFUSER_EXPORT(mfuser_selective_scan_bwd_fp16, ScanParams) { return backward_any<fp16>(*params, stream); }
