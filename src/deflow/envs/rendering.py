"""The graphics library for pictures on a machine that may have no screen."""

from __future__ import annotations

import ctypes.util


def off_screen() -> str:
    """What `MUJOCO_GL` should be: `egl` where its libraries are, else `disabled`."""
    opengl = ctypes.util.find_library("OpenGL") or ctypes.util.find_library("GL")  # PyOpenGL takes either beside EGL
    return "egl" if opengl and ctypes.util.find_library("EGL") else "disabled"
