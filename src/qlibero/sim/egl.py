"""Says whether this machine can render without a screen: silent with exit status 0, or one line and 1.

Asks for the thing itself, as MuJoCo will: the loader for the libraries, EGL for a device that starts. Needs no package,
because setup.sh asks before there is any, and asks no installer, because clusters have drivers and modules instead.
"""

import ctypes
import os
import sys

PLATFORM_DEVICE = 0x313F  # EGL_PLATFORM_DEVICE_EXT


def library(*names: str) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problem = error
    raise SystemExit(f"the loader finds no {names[0]} ({problem})")


if os.environ.get("MUJOCO_GL", "egl").lower() == "osmesa":
    library("libOSMesa.so.8", "libOSMesa.so", "libOSMesa.so.6")
    sys.exit()

os.environ.setdefault("EGL_LOG_LEVEL", "fatal")  # one line is said, and it is ours
egl = library("libEGL.so.1")
library("libOpenGL.so.0", "libGL.so.1")
egl.eglGetProcAddress.restype = ctypes.c_void_p
asked = {name: egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")}
if not all(asked.values()):
    raise SystemExit("libEGL.so.1 has no eglQueryDevicesEXT: it is too old to render without a screen")
pointer, integer = ctypes.c_void_p, ctypes.c_int
query = ctypes.CFUNCTYPE(integer, integer, pointer, pointer)(asked[b"eglQueryDevicesEXT"])
display_of = ctypes.CFUNCTYPE(pointer, integer, pointer, pointer)(asked[b"eglGetPlatformDisplayEXT"])
devices, count = (pointer * 64)(), integer(0)
query(64, devices, ctypes.byref(count))
if not count.value:
    raise SystemExit("libEGL.so.1 is here but knows no device: a driver for it is missing (Mesa's or NVIDIA's)")
egl.eglInitialize.argtypes = [pointer, pointer, pointer]
started = (egl.eglInitialize(display, None, None) for i in range(count.value)
           if (display := display_of(PLATFORM_DEVICE, devices[i], None)))  # fmt: skip
if not any(started):
    raise SystemExit(f"EGL has {count.value} device(s) and none starts: its driver is missing or may not be used")
os._exit(0)  # EGL's exit handlers only print errors
