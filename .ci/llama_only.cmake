# Included by CMake right after llama.cpp's project(): leaves out its common library, programs and their HTTP
# client, which qvl does not use and which are half of what would be compiled. llama-cpp-python forces the cache
# entry ON; a variable of llama.cpp's own scope comes before it.
set(LLAMA_BUILD_COMMON OFF)
