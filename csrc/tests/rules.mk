# Targets for the C++ code alone; part of the Makefile at the root. They need a compiler and nothing else.
SECONDS ?= 30
SEED ?=
SANITIZE_FLAGS := -std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all \
    -fno-omit-frame-pointer -Wall -Wextra -Wno-psabi
KERNEL_SOURCES := $(wildcard csrc/kernels/*.cpp csrc/plan/*.cpp)
TEST_NAMES := $(basename $(notdir $(wildcard csrc/tests/*_test.cpp)))
SANITIZED := $(patsubst csrc/%.cpp,build/sanitize/%.o,$(KERNEL_SOURCES))
ISAS := best avx2 plain
# Threads that wait asleep do not slow those down that work, where there are more of them than cores.
WITH_ISA = env OMP_WAIT_POLICY=passive $$([ $$isa = best ] || echo DYNACONV_ISA=$$isa)

.PHONY: sanitize fuzz arm
.SECONDARY:
-include $(wildcard build/sanitize/*/*.d build/arm/*/*.d)

sanitize: ## run the C++ tests under the address, undefined-behaviour and leak sanitizers
	@$(MAKE) -j$(WORKERS) $(TEST_NAMES:%=build/sanitize/%)
	@for isa in $(ISAS); do for name in $(TEST_NAMES); do \
	    echo "$$name, $$isa"; \
	    $(WITH_ISA) build/sanitize/$$name; \
	done; done

fuzz: ## feed random plans and masks to the sanitized kernels for SECONDS=30
	@$(MAKE) -j$(WORKERS) build/sanitize/plan_fuzz
	@for isa in $(ISAS); do \
	    echo "plan_fuzz, $$isa"; \
	    $(WITH_ISA) build/sanitize/plan_fuzz $$(($(SECONDS) / 3)) $(SEED); \
	done

build/sanitize/%.o: csrc/%.cpp
	@mkdir -p $(@D)
	@$(CXX) $(SANITIZE_FLAGS) -MMD -MP -c $< -o $@

build/sanitize/%_test: build/sanitize/tests/%_test.o $(SANITIZED)
	@$(CXX) $(SANITIZE_FLAGS) $^ -o $@

build/sanitize/plan_fuzz: build/sanitize/tests/plan_fuzz.o $(SANITIZED)
	@$(CXX) $(SANITIZE_FLAGS) $^ -o $@

# Another architecture has only the plain kernels; qemu-user runs them where it is installed.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64-static

arm: $(TEST_NAMES:%=build/arm/%) ## build for ARM with a cross compiler and run the C++ tests in qemu
	@if ! command -v $(ARM_RUN) >/dev/null; then echo "built; $(ARM_RUN) is not here to run the tests"; exit 0; fi; \
	for name in $(TEST_NAMES); do echo $$name; $(ARM_RUN) build/arm/$$name; done

build/arm/%.o: csrc/%.cpp
	@mkdir -p $(@D)
	@$(ARM_CXX) $(KERNEL_FLAGS) -Werror -MMD -MP -c $< -o $@

build/arm/%_test: build/arm/tests/%_test.o $(patsubst csrc/%.cpp,build/arm/%.o,$(KERNEL_SOURCES))
	@$(ARM_CXX) -fopenmp -static $^ -o $@
