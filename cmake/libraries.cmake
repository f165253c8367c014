# The libraries the core stands on. All are Debian packages, listed in scripts/setup.

find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
pkg_check_modules(LIBURING REQUIRED IMPORTED_TARGET liburing>=2.3)
pkg_check_modules(LIBCRYPTO REQUIRED libcrypto>=3.0)
pkg_check_modules(LIBSSL REQUIRED libssl>=3.0)
pkg_check_modules(ZLIB REQUIRED zlib)
pkg_check_modules(LIBZSTD REQUIRED libzstd)

add_library(pqblk_libraries INTERFACE)
target_link_libraries(pqblk_libraries INTERFACE PkgConfig::LIBURING Threads::Threads)

# Node itself exports the symbols of its own OpenSSL and zlib, and the dynamic linker would bind the
# addon's calls to those, or, worse, some to those and the rest to the system's library. Archives
# linked into the addon, with their symbols hidden, cannot be interposed.
foreach(library ssl crypto z zstd)
  find_library(PQBLK_LIB_${library} NAMES lib${library}.a ${library} REQUIRED)
  target_link_libraries(pqblk_libraries INTERFACE "${PQBLK_LIB_${library}}")
endforeach()

# intel-ipsec-mb exists for x86-64 alone and ships no pkg-config file; elsewhere libcrypto seals.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  find_library(PQBLK_IPSEC_MB IPSec_MB REQUIRED)
  find_path(PQBLK_IPSEC_MB_INCLUDE intel-ipsec-mb.h REQUIRED)
  target_include_directories(pqblk_libraries SYSTEM INTERFACE "${PQBLK_IPSEC_MB_INCLUDE}")
  target_link_libraries(pqblk_libraries INTERFACE "${PQBLK_IPSEC_MB}")
  target_compile_definitions(pqblk_libraries INTERFACE PQBLK_HAVE_IPSEC_MB=1)
endif()
