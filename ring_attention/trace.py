"""Names in a profiler's trace for what the attention modules do: `with labelled("merge"): ...`.

Used by `ring` and `exchange`; `recipes.breakdown` reads the names. Outside a profiler a range costs 0.25 us;
torch.profiler.record_function, for the same entry in the trace, 5 us. It also counts as an operator, so that a kernel
which is launched past torch's operators, from Triton or CuTe, is linked to the range that it was launched in.
"""

from __future__ import annotations

from torch._C._profiler import _RecordFunctionFast  # torch's compiler labels its kernels with it; has no public name

labelled = _RecordFunctionFast
