#include "run.h"
void step_dynamic_conv(Worker&, const Step&) {}
void step_channel_fusion(Worker&, const Step&) {}
int64_t scratch_dynamic(const Plan&, const Step&) { return 0; }
