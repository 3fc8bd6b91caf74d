# Every target is enough on a fresh Debian 12: missing packages are installed first (root or sudo).
VESPER := build/bin/vesper
RESULTS := docs/results/h100

.PHONY: demo test build dist results sanitize fuzz lint format clean help

demo: build ## generate text with the demo model, on what this machine can run
	configs/demo/run.sh $(VESPER)

test: ## build all that the toolchain allows and run the tests
	configs/scripts/setup.sh build test
	configs/scripts/build.sh test
	configs/scripts/test.sh

build: ## build build/bin/vesper for what this machine can run
	configs/scripts/setup.sh build
	configs/scripts/build.sh run

dist: ## write a bundle to dist/ that runs on other x86-64 Linux machines
	configs/scripts/setup.sh build test dist
	configs/scripts/build.sh release
	configs/scripts/dist.sh

results: ## measure on this machine's GPU what docs/results shows, into RESULTS (docs/results/h100), and draw it
	python3 apps/results/measure.py $(RESULTS)
	python3 apps/results/render.py $(RESULTS) --configs configs/attention/$(notdir $(RESULTS))

sanitize: ## run the tests of the CPU half under AddressSanitizer and UndefinedBehaviorSanitizer
	configs/scripts/setup.sh build test
	configs/scripts/build.sh sanitize
	configs/scripts/test.sh build-sanitize 1800

fuzz: ## feed broken files to all that reads files, FUZZ_SECONDS (600) for each kind
	configs/scripts/setup.sh build fuzz
	configs/scripts/fuzz.sh

lint: ## check the format of all sources, and clang-tidy on the host sources
	configs/scripts/setup.sh build lint
	configs/scripts/lint.sh

format: ## format all sources in place
	configs/scripts/setup.sh lint
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format-14 -i

clean: ## remove everything that was built
	rm -rf build build-* dist

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14
