"""Benchmarks of vramkit. Each script prints a table and writes JSON; results/ keeps what was measured, where and when."""
