// The kernels as operators of torch, for CPU tensors: this folder alone knows torch, through its stable ABI.
//
// What the kernels cannot run goes to the overload `eager` of the same operator, which is written in PyTorch operations.

#include "operators.h"

// Read by dynaconv/ops/_native.py before it loads the library: one built for other operators must not register.
extern "C" __attribute__((visibility("default"), used)) const char dynaconv_ops_marker[] = "dynaconv operators, version 1";

STABLE_TORCH_LIBRARY_IMPL(dynaconv, CPU, library) {
  library.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  library.impl("masked_residual", TORCH_BOX(&masked_residual));
  library.impl("mask_logits", TORCH_BOX(&mask_logits));
  library.impl("dynamic_conv2d", TORCH_BOX(&dynamic_conv2d));
  library.impl("pack_branch", TORCH_BOX(&pack_branch));
  library.impl("squeeze_mask", TORCH_BOX(&squeeze_mask));
  library.impl("run_branch", TORCH_BOX(&run_branch));
}
