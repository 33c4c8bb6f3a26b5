"""Devices and fabrics by name, each figure with its source.

Sources: [ml-eng] stas00/ml-engineering at 744d01e18b, compute/accelerator/README.md
and network/README.md; [llm-analysis] cli99/llm-analysis at d841e40aec, gpu_configs;
[nccl] NCCL's tuner constants (src/graph/tuning.cc) for latencies. Peaks are dense;
bandwidths are per device and direction. `efficiency` is the best measured share of
the dense bf16 peak for large products (mamf tables in [ml-eng]) where one exists.
"""

from __future__ import annotations

T, G = 1e12, 1e9
GIB = 2.0**30

# name: kind, memory, reserve, peaks, memory bandwidth, launch, efficiency, in-host tier, host link, source
DEVICES: dict[str, dict] = {
    "v100": {
        "kind": "cuda", "memory": 32 * GIB, "peak_flops": {"f16": 125 * T, "f32": 15.7 * T},
        "memory_bandwidth": 900 * G, "efficiency": 0.75, "nvlink": 150 * G, "host_link": 16 * G,
        "source": "llm-analysis v100-sxm-32gb; NVIDIA V100 datasheet (f32)",
    },
    "a100": {
        "kind": "cuda", "memory": 80 * GIB, "peak_flops": {"bf16": 312 * T, "f16": 312 * T, "tf32": 156 * T, "f32": 19.5 * T},
        "memory_bandwidth": 2000 * G, "efficiency": 271.2 / 312, "nvlink": 300 * G, "host_link": 31 * G,
        "source": "ml-eng A100 SXM 80GB; mamf 271.2",
    },
    "a100-40": {
        "kind": "cuda", "memory": 40 * GIB, "peak_flops": {"bf16": 312 * T, "f16": 312 * T, "tf32": 156 * T, "f32": 19.5 * T},
        "memory_bandwidth": 1555 * G, "efficiency": 271.2 / 312, "nvlink": 300 * G, "host_link": 31 * G,
        "source": "ml-eng A100 SXM; llm-analysis a100-sxm-40gb (bandwidth)",
    },
    "h100": {
        "kind": "cuda", "memory": 80 * GIB, "peak_flops": {"bf16": 989 * T, "f16": 989 * T, "f8e4m3fn": 1979 * T, "tf32": 494.5 * T, "f32": 67 * T},
        "memory_bandwidth": 3350 * G, "efficiency": 794.5 / 989, "nvlink": 450 * G, "host_link": 63 * G,
        "source": "ml-eng H100 SXM; mamf 794.5",
    },
    "h200": {
        "kind": "cuda", "memory": 141e9, "peak_flops": {"bf16": 989 * T, "f16": 989 * T, "f8e4m3fn": 1979 * T, "tf32": 494.5 * T, "f32": 67 * T},
        "memory_bandwidth": 4800 * G, "efficiency": 794.5 / 989, "nvlink": 450 * G, "host_link": 63 * G,
        "source": "ml-eng H200 SXM",
    },
    "b200": {
        "kind": "cuda", "memory": 180e9, "peak_flops": {"bf16": 2250 * T, "f16": 2250 * T, "f8e4m3fn": 4500 * T, "tf32": 1125 * T, "f32": 80 * T},
        "memory_bandwidth": 8000 * G, "efficiency": 1745 / 2250, "nvlink": 900 * G, "host_link": 63 * G,
        "source": "ml-eng B200 SXM; mamf 1745",
    },
    "gb200": {
        "kind": "cuda", "memory": 186e9, "peak_flops": {"bf16": 2500 * T, "f16": 2500 * T, "f8e4m3fn": 5000 * T, "tf32": 1250 * T, "f32": 80 * T},
        "memory_bandwidth": 8000 * G, "efficiency": 1745 / 2250, "nvlink": 900 * G, "host_link": 450 * G,
        "source": "ml-eng GB200; efficiency of B200; NVLink-C2C 450 GB/s each way (NVIDIA GB200 datasheet)",
    },
    "v4": {
        "kind": "tpu", "memory": 32 * GIB, "peak_flops": {"bf16": 275 * T, "f32": 275 * T / 4},
        "memory_bandwidth": 1228 * G, "efficiency": 0.8, "ici": 50 * G * 6 / 2, "host_link": 16 * G,
        "source": "Jouppi et al., ISCA 2023, table 4: 275 TFLOP/s, 1200 GB/s, six ICI links of 50 GB/s",
    },
    "v5e": {
        "kind": "tpu", "memory": 16 * GIB, "peak_flops": {"bf16": 197 * T, "f32": 197 * T / 4},
        "memory_bandwidth": 819 * G, "efficiency": 0.8, "ici": 100 * G, "host_link": 16 * G,
        "source": "Google Cloud TPU v5e page: 197 TFLOP/s, 819 GB/s, 1600 Gb/s ICI per chip both ways",
    },
    "v5p": {
        "kind": "tpu", "memory": 95 * GIB, "peak_flops": {"bf16": 459 * T, "f32": 459 * T / 4},
        "memory_bandwidth": 2765 * G, "efficiency": 0.8, "ici": 300 * G, "host_link": 16 * G,
        "source": "Google Cloud TPU v5p page: 459 TFLOP/s, 2765 GB/s, 4800 Gb/s ICI per chip both ways",
    },
    "v6e": {
        "kind": "tpu", "memory": 32 * GIB, "peak_flops": {"bf16": 918 * T, "f32": 918 * T / 4},
        "memory_bandwidth": 1640 * G, "efficiency": 0.8, "ici": 224 * G, "host_link": 16 * G,
        "source": "Google Cloud TPU v6e page: 918 TFLOP/s, 1640 GB/s, 3584 Gb/s ICI per chip both ways",
    },
    "cpu": {
        "kind": "cpu", "memory": 2 * GIB, "peak_flops": {"f32": 16e9, "bf16": 16e9},
        "memory_bandwidth": 3e9, "efficiency": 1.0, "shared": 0.75e9, "host_link": 3e9,
        "source": "an emulated device on a two-core machine, `measure` with 8 devices",
    },
}  # fmt: skip

# name: (bandwidth per device and direction, seconds of latency, source)
FABRICS: dict[str, tuple[float, float, str]] = {
    "ib100": (12.5e9, 6e-6, "100 Gb/s per device"),
    "ib200": (25e9, 6e-6, "200 Gb/s per device"),
    "hdr200": (25e9, 6e-6, "HDR InfiniBand, one 200 Gb/s adapter per device (DGX A100)"),
    "ib400": (50e9, 6e-6, "400 Gb/s per device (DGX H100)"),
    "ndr400": (50e9, 6e-6, "NDR InfiniBand, one 400 Gb/s adapter per device"),
    "ib800": (100e9, 6e-6, "800 Gb/s per device"),
    "roce200": (25e9, 8e-6, "200 Gb/s per device over Ethernet"),
    "roce400": (50e9, 8e-6, "400 Gb/s per device over Ethernet"),
    "efa400": (6.25e9, 15e-6, "AWS p4d: 4 x 100 Gb/s per host of 8"),
    "efa3200": (50e9, 15e-6, "AWS p5: 32 x 100 Gb/s per host of 8"),
    "eth10": (1.25e9 / 8, 30e-6, "10 Gb/s per host of 8"),
    "eth100": (12.5e9 / 8, 30e-6, "100 Gb/s per host of 8"),
}

PRESETS = ("8xcpu", "v100x8", "a100x8", "h100x8", "h200x8", "b200x8", "gb200-nvl72", "v4-64", "v5e-8", "v5p-256", "v6e-256",
           "4xh100x8@ib400", "32xh100x8@ib400", "128xa100x8@hdr200")  # fmt: skip

# Figures that are often given by mistake: 2:4-sparse peaks and two-way link rates.
SPARSE = {1979e12: 989.5e12, 624e12: 312e12, 3958e12: 1979e12, 4500e12: 2250e12, 9000e12: 4500e12, 1248e12: 624e12}
TWO_WAY = {900e9: 450e9, 600e9: 300e9, 1800e9: 900e9}
LAUNCH = {"cuda": 5e-6, "rocm": 5e-6, "tpu": 2e-6, "cpu": 5e-6}  # seconds per kernel
RESERVE = {"cuda": 2 * GIB, "rocm": 2 * GIB, "tpu": 0.5 * GIB, "cpu": 0.0}  # context, communication buffers
