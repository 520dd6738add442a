"""Everything that measures what mixed precision costs: windows of text, metrics, controls, outlier twins, bisection."""
