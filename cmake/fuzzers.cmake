# Fuzzers: test/fuzz/<name>.cc becomes fuzz_<name>, with seeds in test/fuzz/corpus/<name>/.
# The whole core is instrumented, so the fuzzers want a build directory of their own.

if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "PQBLK_BUILD_FUZZERS wants clang: libFuzzer is part of it")
endif()
target_compile_options(pqblk_options INTERFACE -fsanitize=fuzzer-no-link)

if(NOT TARGET pqblk_test_token_objects)
  add_subdirectory("${PROJECT_SOURCE_DIR}/test/pkcs11-module")
endif()

add_custom_target(pqblk_fuzzers)
file(GLOB fuzzers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/test/fuzz/*.cc")
foreach(source IN LISTS fuzzers)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(fuzz_${name} "${source}")
  target_link_libraries(fuzz_${name} PRIVATE pqblk_core)
  if(name STREQUAL "pkcs11")
    target_link_libraries(fuzz_${name} PRIVATE pqblk_pkcs11 pqblk_test_token_objects)
  endif()
  target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  set_target_properties(fuzz_${name} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/fuzzers")
  add_dependencies(pqblk_fuzzers fuzz_${name})
endforeach()
