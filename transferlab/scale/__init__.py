"""What training costs on one device and on many, on paper: `transferlab scale`.

Steps are compiled for 1, 8 and 64 devices from shapes alone. Their FLOPs, the bytes that a device holds, those that it
moves to and from its memory and those that it receives from other devices imply the time of a step on machines whose
rates are published. Scaling is weak: each device has as many images, whatever their number.

Steps are compiled for CPU devices that stand for any accelerator, or for a TPU slice that need not be here. Those for
the CPU are in float32, as its compiler widens what bfloat16 multiplies: FLOPs, and gradients, which are float32
everywhere, are then an accelerator's; peaks and what is gathered of a shared backbone are up to twice an accelerator's
in bfloat16, and estimates from above. Those for a TPU have their backbone in bfloat16, and are its compiler's own word.
"""
from transferlab.scale.machines import MACHINES as MACHINES, machine as machine
from transferlab.scale.steps import BACKBONES as BACKBONES, Row as Row, Setting as Setting, chosen as chosen
from transferlab.scale.steps import rows as rows
from transferlab.scale.tables import limits as limits, plain as plain, tables as tables, write as write
