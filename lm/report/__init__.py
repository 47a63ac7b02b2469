"""Pages and pictures: report.html of a run (run, measure, figures), explore.html, and `lm info`'s counts."""
