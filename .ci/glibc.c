/* std::shared_ptr, as compiled here, reads this flag of glibc 2.32 and later: whether the process has one thread. An older
   glibc lacks it. The linked binary brings its own, which says no. */
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
