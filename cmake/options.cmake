# How every native target is compiled: language, warnings, optimisation, sanitizers.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# Assertions stay on in Release (no -DNDEBUG): a wrong disk costs more than a compare.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -g1")

if(NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(PQBLK_CCACHE ccache)
  mark_as_advanced(PQBLK_CCACHE)
  if(PQBLK_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER "${PQBLK_CCACHE}")
  endif()
endif()

add_library(pqblk_options INTERFACE)
target_compile_options(pqblk_options INTERFACE
  -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -Wno-missing-field-initializers)
target_compile_definitions(pqblk_options INTERFACE PQBLK_VERSION="${PROJECT_VERSION}")
# gcc 12 sees overlapping copies in "literal" + std::string (gcc bug 105651); later ones do not.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(pqblk_options INTERFACE -Wno-restrict)
endif()

if(PQBLK_SANITIZE STREQUAL "address")
  set(sanitizer -fsanitize=address,undefined -fno-sanitize-recover=all)
  # clang 14 cannot place the type words of this check before coroutines ("Cannot represent a
  # difference across sections").
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    list(APPEND sanitizer -fno-sanitize=function)
  endif()
elseif(PQBLK_SANITIZE STREQUAL "thread")
  set(sanitizer -fsanitize=thread)
  # gcc 12 warns that TSan does not model std::atomic_thread_fence, wherever one is inlined.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(pqblk_options INTERFACE -Wno-tsan)
  endif()
elseif(NOT PQBLK_SANITIZE STREQUAL "none")
  message(FATAL_ERROR "PQBLK_SANITIZE is '${PQBLK_SANITIZE}'; expected none, address or thread")
endif()
if(DEFINED sanitizer)
  # -O1 keeps the reports' stacks readable and the three builds affordable.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1")
  target_compile_options(pqblk_options INTERFACE ${sanitizer} -fno-omit-frame-pointer)
  target_link_options(pqblk_options INTERFACE ${sanitizer})
endif()
