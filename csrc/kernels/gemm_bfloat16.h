// The tiles of the indirect GEMM in bfloat16.

#pragma once

#include "gemm.h"

// As gemm_tile(kBfloat16, ...); null where the processor lacks AVX512_BF16.
GemmTile gemm_tile_bfloat16(int rows);
