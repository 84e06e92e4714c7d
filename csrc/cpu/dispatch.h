// Which instruction set runs: the best that this machine has, or the one that L2L_FAST_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace l2l {

// The kernels in use. The first call reads L2L_FAST_ISA; a name that is unknown or not available throws.
const Kernels& kernels();

// Instruction sets that this build holds and this machine can run, slowest first.
std::vector<std::string> available_instruction_sets();

// Switches the kernels of later calls. Throws std::invalid_argument for a name that is unknown or not available.
void set_instruction_set(const std::string& name);

}  // namespace l2l
