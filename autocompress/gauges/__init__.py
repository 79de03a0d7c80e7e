"""The gauges behind `autocompress.measurement`: one quantity each."""
