# Flags shared by every target, the decision on CUDA, and the function that declares a folder as a library.

if(NOT VESPER_CUDA STREQUAL "OFF")
  find_program(VESPER_NVCC nvcc PATHS ENV CUDACXX /usr/local/cuda/bin)
  if(VESPER_NVCC)
    set(CMAKE_CUDA_COMPILER ${VESPER_NVCC})
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 90a)  # the `release` preset adds 80
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit 12.4)
  endif()
  if(CUDAToolkit_FOUND AND TARGET CUDA::cublasLt)
    set(VESPER_HAVE_CUDA ON)
    message(STATUS "vesper: CUDA ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(VESPER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "VESPER_CUDA=ON, but no CUDA toolkit 12.4 or newer with cuBLAS was found; put nvcc on PATH or set CUDACXX")
  endif()
endif()
if(NOT VESPER_HAVE_CUDA)
  set(VESPER_HAVE_CUDA OFF)
  message(STATUS "vesper: CPU half only (no CUDA toolkit 12.4 or newer, or VESPER_CUDA=OFF)")
endif()

find_package(Threads REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)

add_library(vesper_flags INTERFACE)
target_compile_features(vesper_flags INTERFACE cxx_std_20)
target_include_directories(vesper_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_definitions(vesper_flags INTERFACE VESPER_HAVE_CUDA=$<BOOL:${VESPER_HAVE_CUDA}>)
if(VESPER_FUZZ)
  # On every object, so that libFuzzer sees which branches an input reaches; tests/fuzz links the fuzzer itself.
  # _GLIBCXX_ASSERTIONS: an index past the end of a string or a vector is a finding even where its bytes are there.
  target_compile_options(vesper_flags INTERFACE
    -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_definitions(vesper_flags INTERFACE _GLIBCXX_ASSERTIONS)
  target_link_options(vesper_flags INTERFACE -fsanitize=address,undefined)
endif()
# No contraction of a * b + c: the CPU's sums must not depend on which instructions the compiler may choose.
# CMake 3.25 rejects CUDA_STANDARD 20 with nvcc 13, hence the flag.
target_compile_options(vesper_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-ffp-contract=off>
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-lineinfo;-Xcompiler=-Wall,-Wextra>)
target_link_libraries(vesper_flags INTERFACE Threads::Threads nlohmann_json::nlohmann_json)
if(VESPER_HAVE_CUDA)
  target_link_libraries(vesper_flags INTERFACE CUDA::cudart)
endif()

# vesper_library(<name> CPU <files> CUDA <files> NO_CUDA <files> DEPS <targets>): one library for one folder. CUDA files
# join where the toolkit is there, NO_CUDA files where it is not; DEPS are the folder's arrows of docs/architecture.md.
function(vesper_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "CPU;CUDA;NO_CUDA;DEPS")
  if(VESPER_HAVE_CUDA)
    add_library(${name} STATIC ${arg_CPU} ${arg_CUDA})
  else()
    add_library(${name} STATIC ${arg_CPU} ${arg_NO_CUDA})
  endif()
  target_link_libraries(${name} PUBLIC vesper_flags ${arg_DEPS})
endfunction()

# vesper_lanes(<library> <files>): inner loops of a library, compiled side by side for any x86-64 and for AVX2, in
# namespaces of their own (engine/core/lanes.h). The caller chooses at run time.
function(vesper_lanes library)
  foreach(lanes baseline avx2)
    add_library(${library}_${lanes} OBJECT ${ARGN})
    target_link_libraries(${library}_${lanes} PRIVATE vesper_flags)
    target_compile_definitions(${library}_${lanes} PRIVATE VESPER_LANES=${lanes})
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:${library}_${lanes}>)
  endforeach()
  target_compile_options(${library}_avx2 PRIVATE -mavx2 -mf16c)
endfunction()

# vesper_test(<name> FILES <files> DEPS <targets> [GPU]): one GoogleTest program; GPU tests join where the toolkit is there
# and skip, saying so, on a machine without a GPU.
function(vesper_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "GPU" "" "FILES;DEPS")
  if(arg_GPU AND NOT VESPER_HAVE_CUDA)
    return()
  endif()
  add_executable(${name} ${arg_FILES})
  target_link_libraries(${name} PRIVATE ${arg_DEPS} GTest::gtest_main)
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O1>)  # they take longer to compile than to run
  target_compile_definitions(${name} PRIVATE VESPER_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name})
  if(arg_GPU)
    # One at a time: they share the card's memory.
    set_tests_properties(${name} PROPERTIES LABELS gpu RESOURCE_LOCK gpu)
  endif()
endfunction()
