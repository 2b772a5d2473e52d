# Read by the scripts that compile: what was compiled before, in whichever clone, is not compiled again, where ccache is.
export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
launcher=$(if command -v ccache >/dev/null; then echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache; fi)
