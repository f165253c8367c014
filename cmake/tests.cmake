# Native tests: test/native/<room>/*_test.cc become test_<room>. Everything else under test/native
# (the simulator, helpers) is linked to all of them as pqblk_test_support. <room>_bench.cc becomes
# bench_<room>, which is built only when it is asked for; <name>_peer.cc becomes a program of that name
# beside the tests, for tests of the command line to run.

find_path(PQBLK_DOCTEST_INCLUDE doctest/doctest.h REQUIRED)
set(test_root "${PROJECT_SOURCE_DIR}/test/native")

file(GLOB_RECURSE support CONFIGURE_DEPENDS "${test_root}/*.cc")
list(FILTER support EXCLUDE REGEX "_(test|bench|peer)\\.cc$")
file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/doctest_main.cc" CONTENT
  "#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN\n#include <doctest/doctest.h>\n")
add_library(pqblk_test_support STATIC ${support} "${CMAKE_BINARY_DIR}/doctest_main.cc")
target_include_directories(pqblk_test_support PUBLIC "${test_root}")
target_include_directories(pqblk_test_support SYSTEM PUBLIC "${PQBLK_DOCTEST_INCLUDE}")
target_link_libraries(pqblk_test_support PUBLIC pqblk_core)
target_compile_definitions(pqblk_test_support PUBLIC
  DOCTEST_CONFIG_SUPER_FAST_ASSERTS PQBLK_SOURCE_DIR="${PROJECT_SOURCE_DIR}")

# The simulator must catch faults that are planted in the sealed engine (native/sealed/
# planted_faults.h). Only its own tests get them: these objects take the place of the core's.
file(GLOB planted CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/native/sealed/*.cc" "${PROJECT_SOURCE_DIR}/native/image/sealed_*.cc")
add_library(pqblk_planted OBJECT EXCLUDE_FROM_ALL ${planted})
target_include_directories(pqblk_planted PRIVATE "${PROJECT_SOURCE_DIR}/native")
target_link_libraries(pqblk_planted PRIVATE pqblk_options pqblk_libraries)
target_compile_definitions(pqblk_planted PUBLIC PQBLK_PLANTED_FAULTS=1)

add_subdirectory("${PROJECT_SOURCE_DIR}/test/pkcs11-module")

add_custom_target(pqblk_tests)
add_dependencies(pqblk_tests pqblk_test_token pqblk_pkcs11_process)
file(GLOB rooms CONFIGURE_DEPENDS LIST_DIRECTORIES true "${test_root}/*")
foreach(dir IN LISTS rooms)
  file(GLOB_RECURSE tests CONFIGURE_DEPENDS "${dir}/*_test.cc")
  if(tests)
    get_filename_component(room "${dir}" NAME)
    add_executable(test_${room} ${tests})
    target_link_libraries(test_${room} PRIVATE pqblk_test_support)
    if(room MATCHES "^(sealed|sim)$")
      target_link_libraries(test_${room} PRIVATE pqblk_planted)
    endif()
    if(room STREQUAL "cabi")
      target_link_libraries(test_${room} PRIVATE pqblk_cabi)
    endif()
    if(room STREQUAL "pkcs11")
      target_link_libraries(test_${room} PRIVATE pqblk_pkcs11 pqblk_test_token_objects)
    endif()
    set_target_properties(test_${room} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
    add_dependencies(pqblk_tests test_${room})
  endif()
  file(GLOB peers CONFIGURE_DEPENDS "${dir}/*_peer.cc")
  foreach(source IN LISTS peers)
    get_filename_component(name "${source}" NAME_WE)
    add_executable(${name} "${source}")
    target_link_libraries(${name} PRIVATE pqblk_test_support)
    if(name STREQUAL "soak_peer")
      target_link_libraries(${name} PRIVATE pqblk_cabi)
    endif()
    set_target_properties(${name} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
    add_dependencies(pqblk_tests ${name})
  endforeach()
  file(GLOB benches CONFIGURE_DEPENDS "${dir}/*_bench.cc")
  foreach(source IN LISTS benches)
    get_filename_component(name "${source}" NAME_WE)
    string(REGEX REPLACE "^(.*)_bench$" "bench_\\1" name "${name}")
    add_executable(${name} EXCLUDE_FROM_ALL "${source}")
    target_link_libraries(${name} PRIVATE pqblk_test_support)
  endforeach()
endforeach()
