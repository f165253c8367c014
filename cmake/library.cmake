# libpqblk: the C library (native/include/pqblk.h), and what `cmake --install` puts where.
#
#   pqblk_shared   libpqblk.so: exports the names of pqblk.h and nothing else; OpenSSL, zlib and zstd
#                  are inside, where no other copy in the process can take their place
#   pqblk_static   libpqblk.a: our objects alone; who links it links the libraries of pqblk.pc too
#   pqblk_library  both
#
# Examples and packages find it by pkg-config (pqblk) or find_package(pqblk): targets pqblk::pqblk and
# pqblk::static.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# The number in the soname is the header's PQBLK_ABI_VERSION.
file(STRINGS native/include/pqblk.h abi REGEX "^#define PQBLK_ABI_VERSION [0-9]+$")
string(REGEX MATCH "[0-9]+$" PQBLK_ABI_VERSION "${abi}")
set(version_script "${PROJECT_SOURCE_DIR}/cmake/pqblk.map")

add_library(pqblk_shared SHARED $<TARGET_OBJECTS:pqblk_cabi>)
target_link_libraries(pqblk_shared PRIVATE pqblk_core)
# It stays loaded once it was: threads of it may still run, and glibc would call its destructors.
target_link_options(pqblk_shared PRIVATE
  "-Wl,--version-script=${version_script}" -Wl,-z,defs -Wl,-z,nodelete -Wl,--as-needed)
set_target_properties(pqblk_shared PROPERTIES
  OUTPUT_NAME pqblk EXPORT_NAME pqblk LINKER_LANGUAGE CXX LINK_DEPENDS "${version_script}"
  VERSION "${PQBLK_ABI_VERSION}.${PROJECT_VERSION}" SOVERSION "${PQBLK_ABI_VERSION}")

add_library(pqblk_static STATIC $<TARGET_OBJECTS:pqblk_cabi> $<TARGET_OBJECTS:pqblk_core>)
set_target_properties(pqblk_static PROPERTIES
  OUTPUT_NAME pqblk EXPORT_NAME static LINKER_LANGUAGE CXX)

# What libpqblk.a needs of others. By name and not as packages: pkg-config would want their files even
# from who links libpqblk.so, which has no use for them.
set(private_libraries uring crypto z zstd stdc++ m pthread)
if(PQBLK_IPSEC_MB)
  list(PREPEND private_libraries IPSec_MB)
endif()
target_link_libraries(pqblk_static INTERFACE "$<INSTALL_INTERFACE:${private_libraries}>")

add_custom_target(pqblk_library DEPENDS pqblk_shared pqblk_static)

foreach(target pqblk_shared pqblk_static)
  target_include_directories(${target} INTERFACE
    "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
endforeach()

list(TRANSFORM private_libraries PREPEND "-l" OUTPUT_VARIABLE flags)
list(JOIN flags " " PQBLK_PC_LIBS)
set(pc_dir "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
file(RELATIVE_PATH PQBLK_PC_PREFIX
  "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
configure_file(cmake/pqblk.pc.in "${CMAKE_BINARY_DIR}/pqblk.pc" @ONLY)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/pqblk")
configure_package_config_file(cmake/pqblk-config.cmake.in
  "${CMAKE_BINARY_DIR}/pqblk-config.cmake" INSTALL_DESTINATION "${package_dir}")
# Before 1.0 a minor version may change what is not the ABI.
write_basic_package_version_file("${CMAKE_BINARY_DIR}/pqblk-config-version.cmake"
  VERSION "${PROJECT_VERSION}" COMPATIBILITY SameMinorVersion)

install(TARGETS pqblk_shared pqblk_static EXPORT pqblk-targets
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES native/include/pqblk.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES "${CMAKE_BINARY_DIR}/pqblk.pc" DESTINATION "${pc_dir}")
install(EXPORT pqblk-targets NAMESPACE pqblk:: DESTINATION "${package_dir}")
install(FILES "${CMAKE_BINARY_DIR}/pqblk-config.cmake"
  "${CMAKE_BINARY_DIR}/pqblk-config-version.cmake" DESTINATION "${package_dir}")
